"""Messages in pieces, several at once, cut off, and with a descriptor beside them."""

from __future__ import annotations

import os
import socket
import threading

import pytest

from orchestrator.queue.wire import (
    Busy,
    Exited,
    Inbox,
    Outcome,
    Started,
    Stop,
    final_state,
    pack,
    receive_exactly,
    receive_with_fds,
    send_with_fds,
    unpack,
)
from orchestrator.record import RunState

MESSAGES = [Started(7, 1.5, 6), Exited(), Outcome(completed=True, return_value={"a": [1, None]})]


@pytest.fixture
def pipe():
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    ends = {"reader": reader, "writer": writer}
    yield ends
    for descriptor in ends.values():
        os.close(descriptor)


@pytest.fixture
def pair():
    ends = socket.socketpair()
    yield ends
    for end in ends:
        end.close()


def test_a_message_unpacks_to_itself():
    for message in (*MESSAGES, Stop(), Busy(), None, b"\x00" * 100):
        assert unpack(pack(message)) == message


def test_a_message_is_there_once_its_last_byte_is(pipe):
    inbox = Inbox(pipe["reader"])
    assert inbox.receive() == []
    for message in MESSAGES:
        *most, last = (bytes([byte]) for byte in pack(message))
        for byte in most:
            os.write(pipe["writer"], byte)
            assert inbox.receive() == []
        os.write(pipe["writer"], last)
        assert inbox.receive() == [message]
    assert not inbox.closed


def test_several_messages_and_a_half_arrive_at_once(pipe):
    inbox = Inbox(pipe["reader"])
    data = b"".join(map(pack, MESSAGES))
    half = len(pack(MESSAGES[0])) // 2
    os.write(pipe["writer"], data + data[:half])
    assert inbox.receive() == MESSAGES
    os.write(pipe["writer"], data[half:])
    assert inbox.receive() == MESSAGES


def test_the_end_is_seen_after_the_last_message_and_half_a_one_is_none(pipe):
    inbox = Inbox(pipe["reader"])
    os.write(pipe["writer"], pack(Stop()) + pack(Stop())[:-1])
    os.close(pipe["writer"])
    assert inbox.receive() == [Stop()]
    assert not inbox.closed
    assert inbox.receive() == []
    assert inbox.closed
    pipe["writer"] = os.dup(pipe["reader"])


def test_a_descriptor_that_cannot_be_read_is_an_end():
    inbox = Inbox(os.open(os.devnull, os.O_WRONLY))
    assert inbox.receive() == []
    assert inbox.closed
    os.close(inbox.descriptor)


def test_a_message_larger_than_any_buffer(pair):
    ours, theirs = pair
    message = os.urandom(3_000_000)
    sender = threading.Thread(target=ours.sendall, args=(pack(message) + pack(Exited()),))
    sender.start()
    inbox, got = Inbox(theirs.fileno()), []
    while len(got) < 2:
        got += inbox.receive()
    sender.join()
    assert got == [message, Exited()]


def test_descriptors_travel_with_their_message(pair, tmp_path):
    ours, theirs = pair
    sent = [(["x"] * 200_000, "first"), (None, "second")]

    def send():
        for message, name in sent:
            flags = os.O_WRONLY | os.O_CREAT
            files = [os.open(tmp_path / f"{name}-{number}", flags) for number in range(40)]
            send_with_fds(ours, pack(message), files)
            for descriptor in files:
                os.close(descriptor)
        ours.close()

    sender = threading.Thread(target=send)
    sender.start()
    for message, name in sent:
        packed, descriptors = receive_with_fds(theirs)
        assert unpack(packed) == message
        for number, descriptor in enumerate(descriptors):
            os.write(descriptor, name.encode())
            os.close(descriptor)
            assert (tmp_path / f"{name}-{number}").read_text() == name
    sender.join()
    assert receive_with_fds(theirs) is None


def test_a_sender_that_goes_away_in_the_middle_is_an_error(pair):
    ours, theirs = pair
    with open(os.devnull) as file:
        send_with_fds(ours, pack(Stop())[:-1], [file.fileno()])
    ours.close()
    with pytest.raises(EOFError):
        receive_with_fds(theirs)
    with pytest.raises(EOFError):
        receive_exactly(theirs, 1)
    assert receive_exactly(theirs, 0) == b""


def test_only_a_task_that_returned_in_a_process_that_ended_well_is_completed():
    returned, raised = Outcome(completed=True), Outcome(completed=False)
    assert final_state(returned, 0) is RunState.COMPLETED
    for outcome, returncode in ((returned, 1), (returned, -9), (raised, 0), (raised, 1), (None, 0)):
        assert final_state(outcome, returncode) is RunState.FAILED
