"""The policy: every decision of it, on thousands of random machines."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.queue.assign import Load, Rules, decide, hold, impossible, schedule, why_not
from orchestrator.queue.gpus import Gpu
from orchestrator.queue.needs import Need

G = 10**9


def load(index, **known):
    total = known.pop("total", 80 * G)
    used = known.get("used", 0)
    gpu = Gpu(f"GPU-{index}", index, mig=known.pop("mig", None))
    return Load(gpu, **{"total": total, "free": total - used, **known})


@st.composite
def machines(draw):
    loads = []
    for index in range(draw(st.integers(1, 6))):
        total = draw(st.sampled_from([16, 40, 80])) * G
        used = draw(st.integers(0, total))
        processes = draw(st.integers(0, 4))
        loads.append(
            Load(
                Gpu(f"GPU-{index}", index, mig=draw(st.sampled_from([None, None, None, 1]))),
                total=total,
                used=used,
                free=total - used,
                measured=draw(st.sampled_from([True, True, False])),
                reserved=draw(st.integers(0, total)) if processes else 0,
                expected=draw(st.integers(0, total)) if processes else 0,
                processes=processes,
                limit=draw(st.integers(max(1, processes), 6)) if processes else None,
                by_sweeps=draw(st.integers(0, used)) if processes else 0,
                foreign=draw(st.booleans()),
                usable=draw(st.sampled_from([True, True, True, False])),
                ready=draw(st.sampled_from([True, True, True, False])),
                awaited=draw(st.sampled_from([False, False, False, True])),
            )
        )
    return tuple(loads)


needs = st.builds(
    Need,
    gpus=st.integers(1, 4),
    memory=st.none() | st.integers(1, 90).map(lambda n: n * G),
    alone=st.booleans(),
)
rules = st.builds(
    Rules,
    per_gpu=st.integers(1, 4),
    threshold=st.none() | st.integers(0, 80).map(lambda n: n * G),
    exclusive=st.booleans(),
)


def fits(load, need, rules):
    """The rule as the documentation says it, written a second time."""
    limit = min(
        [rules.per_gpu, *([load.limit] if load.limit else []), *([1] if need.alone else [])]
    )
    enough = not load.measured or (
        (rules.threshold is None or load.used + load.reserved <= rules.threshold)
        and (need.memory is None or load.free - load.reserved >= need.memory)
    )
    return (
        load.usable
        and load.ready
        and not load.awaited
        and load.processes < limit
        and not (rules.exclusive and load.foreign)
        and enough
        and (need.gpus == 1 or load.gpu.mig is None)
    )


@given(machines(), needs, rules)
def test_a_job_gets_the_emptiest_of_the_gpus_that_fit_or_waits(loads, need, rules):
    fitting = [x for x in loads if fits(x, need, rules)]
    chosen = decide(loads, need, rules)
    if len(fitting) < need.gpus:
        assert chosen is None
        return
    assert len(chosen) == need.gpus == len({x.gpu.uuid for x in chosen})
    assert set(chosen) <= set(fitting)
    others = [x for x in fitting if x not in chosen]

    def key(x):
        return (x.used + x.expected, x.processes, x.gpu.index)

    assert all(key(a) <= key(b) for a in chosen for b in others)


@given(machines(), st.lists(needs, max_size=6), rules)
def test_what_starts_together_fits_together(loads, wants, rules):
    given_out, held = schedule(loads, wants, rules)
    state = {x.gpu.uuid: x for x in loads}
    starting = [number for number, _ in given_out]
    assert starting == sorted(set(starting))
    for number, gpus in given_out:
        need = wants[number]
        assert len(gpus) == need.gpus
        for gpu in gpus:
            before = state[gpu.uuid]
            assert fits(before, need, rules)
            state[gpu.uuid] = before.taken_by(need, rules)
    for uuid, after in state.items():
        assert after.processes <= max(
            rules.per_gpu, next(x.processes for x in loads if x.gpu.uuid == uuid)
        )
    # What is held for the first that waits goes to none of those behind it.
    waiting = [number for number in range(len(wants)) if number not in starting]
    if waiting and held:
        late = [gpus for number, gpus in given_out if number > waiting[0]]
        assert not held & {gpu.uuid for gpus in late for gpu in gpus}
        assert len(held) == wants[waiting[0]].gpus
    if not waiting:
        assert not held


@given(machines(), needs, rules)
def test_only_gpus_that_may_serve_one_day_are_held_and_they_stay_the_same(loads, need, rules):
    held = hold(loads, need, rules)
    assert len(held) in (0, need.gpus)
    assert hold(loads, need, rules, held) == held
    for x in loads:
        if x.gpu.uuid in held:
            assert x.usable
            assert not x.measured or need.memory is None or x.free + x.by_sweeps >= need.memory


@given(machines(), needs, rules)
def test_a_job_that_can_be_placed_is_not_called_impossible(loads, need, rules):
    gpus = [(x.gpu, x.total if x.measured else 0) for x in loads]
    if decide(loads, need, rules) is not None:
        assert impossible(gpus, need) == ""


@given(st.integers(1, 8), st.integers(1, 5), st.data())
def test_a_large_job_gets_its_turn_while_small_ones_keep_coming(total, per_gpu, data):
    """However long small jobs keep coming, GPUs that are held empty, and the large one starts."""
    rules = Rules(per_gpu)
    large = Need(gpus=data.draw(st.integers(1, total)), alone=True)
    running = {n: data.draw(st.integers(0, per_gpu)) for n in range(total)}
    held = frozenset()
    for _ in range(total * per_gpu + 1):
        loads = tuple(
            load(n, processes=count, limit=per_gpu if count else None)
            for n, count in running.items()
        )
        given_out, held = schedule(loads, [large, *[Need()] * 50], rules, held)
        if given_out and given_out[0][0] == 0:
            return
        for _, gpus in given_out:
            for gpu in gpus:
                running[gpu.index] += 1
        # One job ends, anywhere: at worst where nothing is held.
        busy = [n for n, count in running.items() if count]
        free_ones = [n for n in busy if f"GPU-{n}" in held]
        running[(free_ones or busy)[0]] -= 1
    pytest.fail(f"a job of {large.gpus} GPUs starved: {running}, held {held}")


def test_jobs_that_start_together_spread_before_their_memory_shows():
    loads = [load(0, used=3), load(1, used=4)]
    given_out, _ = schedule(loads, [Need()] * 4, Rules(per_gpu=2))
    assert [gpus[0].index for _, gpus in given_out] == [0, 1, 0, 1]


def test_later_jobs_fill_what_the_first_one_leaves():
    # The large job needs more memory than a foreign program leaves on GPU 0: that one is left.
    loads = [load(0, used=60 * G), load(1, processes=1, limit=1), load(2)]
    wants = [Need(gpus=2, memory=40 * G), Need(memory=10 * G), Need(memory=10 * G)]
    given_out, held = schedule(loads, wants, Rules())
    assert held == {"GPU-1", "GPU-2"}
    assert [(number, gpu.index) for number, (gpu,) in given_out] == [(1, 0)]


def test_the_first_moves_on_to_gpus_that_are_emptier_by_now():
    busy = [load(n, processes=2, limit=4) for n in range(2)]
    need = Need(gpus=2, alone=True)
    held = hold([*busy, load(2, processes=4, limit=4)], need, Rules(4))
    assert held == {"GPU-0", "GPU-1"}
    assert hold([*busy, load(2, processes=2, limit=4)], need, Rules(4), held) == held
    assert hold([*busy, load(2, processes=1, limit=4)], need, Rules(4), held) == {"GPU-0", "GPU-2"}


@pytest.mark.parametrize(
    ("change", "need", "rules", "why"),
    [
        ({"usable": False, "closed": "it is paused"}, Need(), Rules(), "it is paused"),
        ({"usable": False}, Need(), Rules(), "does not answer"),
        ({"ready": False}, Need(), Rules(), "just been started"),
        ({"awaited": True}, Need(), Rules(), "another sweep has waited"),
        ({"processes": 2, "limit": 4}, Need(), Rules(2), "2 jobs there, and at most 2"),
        ({"processes": 1, "limit": 1}, Need(), Rules(4), "1 job there, and at most 1"),
        ({"processes": 1, "limit": 4}, Need(alone=True), Rules(4), "1 job there"),
        ({"foreign": True}, Need(), Rules(exclusive=True), "another program"),
        ({"used": 41 * G, "free": 39 * G}, Need(), Rules(threshold=40 * G), "41 GB are in use"),
        ({"free": 9 * G}, Need(memory=10 * G), Rules(), "9 GB are free, the job needs 10 GB"),
        ({"reserved": 75 * G}, Need(memory=10 * G), Rules(), "5 GB are free"),
    ],
)
def test_why_a_job_waits_is_told(change, need, rules, why):
    empty = load(0)
    assert why_not(empty, need, rules) == ""
    assert why in why_not(replace(empty, **change), need, rules)


@pytest.mark.parametrize(
    ("need", "why"),
    [
        (Need(gpus=4), "it needs 4 GPUs, this sweep has 3"),
        (Need(gpus=3), "one MIG instance a process and this sweep has 2 undivided"),
        (Need(memory=50 * G), "of which this sweep has 0; the largest has 40 GB when it idles"),
        (Need(gpus=2, memory=30 * G), "it needs 30 GB on 2 GPUs, of which this sweep has 1"),
        (Need(gpus=2, memory=20 * G), ""),
        (Need(gpus=0, memory=500 * G), ""),
    ],
)
def test_what_no_moment_will_bring_is_said(need, why):
    gpus = [
        (Gpu("GPU-0", 0), 40 * G),
        (Gpu("GPU-1", 1), 24 * G),
        (Gpu("MIG-2", 2, mig=0), 10 * G),
    ]
    reason = impossible(gpus, need)
    assert why in reason
    assert bool(reason) == bool(why)
