"""Orders to a sweep that runs, as its launcher reads them."""

from __future__ import annotations

import json
import os
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.queue.control import (
    CONTROL_NAME,
    Control,
    Orders,
    UnreadableOrdersError,
    change_orders,
    read_orders,
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / CONTROL_NAME


def give(path, *words):
    return change_orders(path, lambda orders: orders.give(*words))


def take_back(path, *words):
    return change_orders(path, lambda orders: orders.take_back(*words))


def state(control):
    return control.queue, dict(control.gpus), control.problem


def test_without_a_file_nothing_was_ordered(path):
    control = Control(path)
    assert not control.poll()
    assert state(control) == ("run", {}, "")


def test_orders_arrive_once(path):
    control = Control(path)
    give(path, "pause", ["GPU-a", "GPU-b"])
    assert control.poll()
    assert state(control) == ("run", {"GPU-a": "pause", "GPU-b": "pause"}, "")
    assert not control.poll()
    give(path, "drain", ["GPU-a"])
    give(path, "drain")
    assert control.poll()
    assert state(control) == ("drain", {"GPU-a": "drain", "GPU-b": "pause"}, "")
    take_back(path, ["GPU-a"])
    assert control.poll()
    assert state(control) == ("drain", {"GPU-b": "pause"}, "")
    take_back(path)
    assert control.poll()
    assert state(control) == ("run", {}, "")


def test_the_same_orders_again_are_no_change(path):
    control = Control(path)
    give(path, "pause")
    assert control.poll()
    give(path, "pause")
    assert not control.poll()


def test_orders_that_were_there_before_are_seen(path):
    give(path, "pause")
    control = Control(path)
    assert control.poll()
    assert control.queue == "pause"


def test_a_file_that_is_gone_takes_its_orders_along(path):
    control = Control(path)
    give(path, "pause")
    assert control.poll()
    path.unlink()
    assert control.poll()
    assert state(control) == ("run", {}, "")
    assert not control.poll()


def test_while_nobody_writes_a_poll_is_one_stat(path, monkeypatch):
    control = Control(path)
    give(path, "pause")
    control.poll()
    calls = []
    real = os.stat
    monkeypatch.setattr(os, "stat", lambda *a, **k: (calls.append(a), real(*a, **k))[1])
    monkeypatch.setattr(os, "open", lambda *_: pytest.fail("the file was opened"))
    assert not control.poll()
    monkeypatch.undo()
    assert len(calls) == 1


GARBAGE = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'{"queue": "stop"}',
    b'{"gpus": {"GPU-a": "run"}}',
    b'{"gpus": ["GPU-a"]}',
    b'{"schema_version": 2}',
    b'{"schema_version": "1"}',
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"later": ' + b"[" * 100_000,
]


@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_is_ignored_with_a_sentence(path, garbage):
    control = Control(path)
    give(path, "pause", ["GPU-a"])
    control.poll()
    path.write_bytes(garbage)
    assert control.poll()
    assert control.gpus == {"GPU-a": "pause"}
    assert str(path) in control.problem
    assert "is ignored" in control.problem
    assert not control.poll()
    # The next order finds no others to keep.
    give(path, "pause")
    assert control.poll()
    assert state(control) == ("pause", {}, "")


def test_a_directory_in_its_place_is_garbage_too(path):
    path.mkdir()
    control = Control(path)
    assert control.poll()
    assert control.problem
    with pytest.raises(UnreadableOrdersError):
        read_orders(path)


def test_fields_of_later_versions_do_not_matter(path):
    path.write_text('{"schema_version": 1, "queue": "pause", "because": "lunch"}')
    assert read_orders(path).queue == "pause"


def test_the_file_says_its_version(path):
    give(path, "pause", ["GPU-a"])
    assert json.loads(path.read_text()) == {
        "schema_version": 1,
        "queue": "run",
        "gpus": {"GPU-a": "pause"},
    }


def test_a_sweep_that_is_gone_is_an_error(tmp_path):
    with pytest.raises(OSError):
        give(tmp_path / "gone" / CONTROL_NAME, "pause")
    assert not (tmp_path / "gone").exists()


def test_commands_at_once_lose_nothing(path):
    def work(name):
        for _ in range(20):
            give(path, "pause", [name])
            give(path, "drain", [name])

    threads = [threading.Thread(target=work, args=(f"GPU-{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read_orders(path).gpus == {f"GPU-{n}": "drain" for n in range(4)}
    assert [entry.name for entry in path.parent.iterdir()] == [CONTROL_NAME]


gpus = st.sets(st.sampled_from("abc"))
steps = st.lists(st.tuples(st.sampled_from(["pause", "drain", "resume"]), gpus), max_size=8)


@given(steps)
def test_orders_are_as_a_plain_table_of_them(steps):
    orders, queue, table = Orders(), "run", {}
    for word, uuids in steps:
        if word == "resume":
            orders = orders.take_back(uuids)
            queue = queue if uuids else "run"
            table = {u: o for u, o in table.items() if uuids and u not in uuids}
        else:
            orders = orders.give(word, uuids)
            queue = queue if uuids else word
            table |= dict.fromkeys(uuids, word)
        assert (orders.queue, orders.gpus) == (queue, table)
    assert Orders() == Orders(queue="run", gpus={})
