"""Slurm's words and ids, translated."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.record import RunState
from orchestrator.slurm.states import base_of, collapse, expand, translate

WORDS = {
    RunState.PENDING: (
        "PENDING CONFIGURING REQUEUED REQUEUE_FED REQUEUE_HOLD SPECIAL_EXIT RESV_DEL_HOLD "
        "EXPEDITING POWER_UP_NODE"
    ),
    RunState.RUNNING: (
        "RUNNING COMPLETING SUSPENDED STOPPED SIGNALING STAGE_OUT RESIZING UPDATE_DB"
    ),
    RunState.COMPLETED: "COMPLETED",
    RunState.FAILED: "FAILED OUT_OF_MEMORY",
    RunState.TIMEOUT: "TIMEOUT DEADLINE",
    RunState.CANCELLED: "CANCELLED PREEMPTED REVOKED",
    RunState.LOST: "NODE_FAIL BOOT_FAIL LAUNCH_FAILED RECONFIG_FAIL",
}

tasks = st.sets(st.integers(0, 4_000_000) | st.integers(0, 30), min_size=1, max_size=60)
bases = st.integers(1, 10**9).map(str)


@pytest.mark.parametrize(
    ("word", "state"), [(word, state) for state, words in WORDS.items() for word in words.split()]
)
def test_every_word_of_slurms_has_a_state(word, state):
    assert translate(word) is state


@pytest.mark.parametrize(
    ("word", "state"),
    [
        ("CANCELLED by 0", RunState.CANCELLED),
        ("CANCELLED by 1000", RunState.CANCELLED),
        ("CANCELLED+", RunState.CANCELLED),
        ("OUT_OF_ME+", RunState.FAILED),
        ("COMPLETED+", RunState.COMPLETED),
    ],
)
def test_who_cancelled_and_what_was_cut_do_not_matter(word, state):
    assert translate(word) is state


@pytest.mark.parametrize("word", ["", "?", "+", "DONE", "COMPLETE", "COMPLET+", "RE+", "completed"])
def test_a_word_that_is_not_known_is_no_state(word):
    assert translate(word) is None


@given(st.text())
def test_no_other_text_is_read_as_over(text):
    state = translate(text)
    first = text.split(" ")[0].rstrip("+")
    assert state is None or any(word.startswith(first) for word in WORDS[state].split())


@pytest.mark.parametrize(
    ("job", "ids"),
    [
        ("123", ["123"]),
        ("123_4", ["123_4"]),
        ("123+1", ["123+1"]),
        ("123_[3-5,8%3]", ["123_3", "123_4", "123_5", "123_8"]),
        ("123_[7]", ["123_7"]),
        ("123_[0-10:5,40]", ["123_0", "123_5", "123_10", "123_40"]),
        ("123_[0-4:0]", ["123_0", "123_1", "123_2", "123_3", "123_4"]),
        # Cut: of 1 nobody knows whether it was 1, or 17.
        ("123_[2,4,6-8,1", ["123_2", "123_4", "123_6", "123_7", "123_8"]),
        ("123_[2,4,...]", ["123_2", "123_4"]),
        ("123_[", []),
        ("123_[]", []),
    ],
)
def test_brackets_are_expanded(job, ids):
    assert expand(job) == ids


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([], []),
        (["200"], ["200"]),
        (["123_0", "200", "123_7", "123_1", "123_2", "123_3"], ["123_[0-3,7]", "200"]),
        (["123_5"], ["123_5"]),
        (["123_5", "123_5", "9", "9"], ["123_5", "9"]),
        (["123_10", "123_9"], ["123_[9-10]"]),
        (["5_1", "5"], ["5_1", "5"]),
        (["7+0", "7+1"], ["7+0", "7+1"]),
        (["123_[0-3]", "123_4"], ["123_[0-4]"]),
    ],
)
def test_tasks_are_collapsed_to_ranges(ids, words):
    assert collapse(ids) == words


@given(st.dictionaries(bases, tasks, max_size=4), st.sets(bases, max_size=3), st.randoms())
def test_what_is_collapsed_expands_to_the_same(arrays, singles, rng):
    ids = [f"{base}_{task}" for base, found in arrays.items() for task in found] + sorted(singles)
    rng.shuffle(ids)
    words = collapse(ids)
    again = [job for word in words for job in expand(word)]
    assert sorted(again) == sorted(ids)
    assert len(words) == len(arrays) + len(singles)


@given(st.text("0123456789_[]-,%:.+ab"))
def test_no_text_of_slurms_is_too_odd_to_expand(text):
    # A range may be as long as its numbers are.
    if max(map(len, text.replace("_", "-").replace(":", "-").split("-"))) < 5:
        for job in expand(text):
            assert base_of(job) == base_of(text)


@pytest.mark.parametrize("job", ["123", "123_4", "123_[5-6%2]", "123+1"])
def test_the_id_that_sbatch_gave(job):
    assert base_of(job) == "123"


def test_the_client_loads_little():
    loaded = subprocess.run(
        [
            *(sys.executable, "-c"),
            "import sys, orchestrator.slurm.client; print(*sys.modules)",
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    heavy = {"hydra", "omegaconf", "numpy", "submitit", "polars", "psutil", "yaml"}
    assert "orchestrator.slurm.client" in loaded
    assert not heavy & set(loaded)
