"""Lease tables: shared by real processes and users, freed by the kernel, safe against vandals."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest

from orchestrator.queue import lease_file, leases
from orchestrator.queue.leases import Entry, Kind, LeaseError, LeaseTables

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="leases need Linux")
as_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become another user"
)

GPU, OTHER = "GPU-aaaa", "GPU-bbbb"
NOBODY = 65534
SIZE = leases.RECORD_SIZE

_PRELUDE = """
import os, signal, socket, sys, time, fcntl, struct, random
from pathlib import Path
from orchestrator.queue.leases import Kind, LeaseError, LeaseTables
directory = Path(sys.argv[1])
def nobody():
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())  # at once, also beside others
def locked(tables):
    while not tables.try_lock():
        time.sleep(0.0002)
def add(tables, uuid="GPU-aaaa", limit=3):
    locked(tables)
    lease = tables.add(uuid, Kind.RUN, limit=limit, reserved=7, since=1.5)
    tables.unlock()
    return lease
"""


@contextlib.contextmanager
def python(code, directory, *arguments, **options):
    """Another process, which is killed at the end."""
    program = _PRELUDE + textwrap.dedent(code)
    with subprocess.Popen(
        [sys.executable, "-c", program, str(directory), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
        **options,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def open_tables(tmp_path):
    with contextlib.ExitStack() as stack:

        def make(uuids=(GPU,), directory=None):
            tables = LeaseTables(uuids, directory or tmp_path / "leases")
            stack.callback(tables.close)
            return tables

        yield make


@pytest.fixture
def everybodys():
    """A directory that other users reach, as they do not reach pytest's own."""
    path = Path(tempfile.mkdtemp(dir="/tmp"))
    path.chmod(0o1777)
    yield path
    shutil.rmtree(path)


def add(tables, uuid=GPU, kind=Kind.RUN, **fields):
    assert tables.try_lock()
    try:
        return tables.add(uuid, kind, **{"limit": 2, "reserved": 5, "since": 1.0, **fields})
    finally:
        tables.unlock()


def table_path(directory, uuid=GPU):
    return directory / f"{uuid}.leases"


def gone_within(tables, seconds, uuid=GPU):
    deadline = time.monotonic() + seconds
    while tables.entries(uuid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


# --- one process ---


def test_an_entry_is_seen_by_others_with_all_that_it_says(open_tables):
    mine, others = open_tables(), open_tables()
    add(mine, kind=Kind.WAIT, limit=3, reserved=2**40, since=123.5)
    expected = Entry(Kind.WAIT, os.getpid(), 0, os.getuid(), 3, 2**40, 123.5, mine=False)
    assert others.entries(GPU) == [expected]
    assert [entry.mine for entry in mine.entries(GPU)] == [True]


def test_an_update_is_seen_and_a_release_ends_it_once(open_tables):
    mine, others = open_tables(), open_tables()
    lease, second = add(mine), add(mine)
    lease.update(root=42)
    lease.update(reserved=0)
    assert [(e.root, e.reserved) for e in others.entries(GPU)] == [(42, 0), (0, 5)]
    assert os.get_inheritable(lease.fileno()) is False
    lease.release()
    lease.release()
    lease.update(reserved=9)
    assert lease.fileno() == -1
    assert len(others.entries(GPU)) == len(mine.entries(GPU)) == 1
    second.release()
    assert others.entries(GPU) == []


def test_the_lowest_free_record_is_used_again(open_tables, tmp_path):
    tables = open_tables()
    held = [add(tables) for _ in range(5)]
    held[1].release()
    add(tables, limit=9)
    assert [entry.limit for entry in tables.entries(GPU)] == [2, 9, 2, 2, 2]
    assert table_path(tmp_path / "leases").stat().st_size == 6 * SIZE


def test_limits_and_needs_beyond_all_measure_fit(open_tables):
    tables = open_tables()
    add(tables, limit=10**15, reserved=10**30)
    (entry,) = tables.entries(GPU)
    assert (entry.limit, entry.reserved) == (2**32 - 1, 2**63 - 1)


def test_each_gpu_has_its_own_table(open_tables):
    tables = open_tables([OTHER, GPU, GPU])
    add(tables, OTHER)
    assert tables.entries(GPU) == []
    assert len(tables.entries(OTHER)) == 1


def test_any_uuid_makes_a_file_of_its_own(open_tables, tmp_path):
    uuids = ["MIG-GPU-1/2/3", "MIG-GPU-1_2_3", "..", "../x", "%2f", "/", "ü"]
    tables = open_tables(uuids)
    assert tables.try_lock()
    assert len(list((tmp_path / "leases").iterdir())) == len(uuids)
    assert not list(tmp_path.glob("*.leases"))


def test_close_and_close_inherited_leave_the_record_to_other_holders(open_tables):
    for end in (LeaseTables.close, LeaseTables.close_inherited):
        mine, others = open_tables(), open_tables()
        lease = add(mine)
        duplicate = os.dup(lease.fileno())
        end(mine)
        assert lease.fileno() == -1
        assert len(others.entries(GPU)) == 1
        os.close(duplicate)
        assert others.entries(GPU) == []


def test_a_release_ends_the_lease_of_other_holders_and_keeps_its_record_from_reuse(open_tables):
    mine, others = open_tables(), open_tables()
    lease = add(mine)
    duplicate = os.dup(lease.fileno())
    lease.release()
    assert others.entries(GPU) == []
    late = add(others)
    os.close(duplicate)
    assert len(mine.entries(GPU)) == 1
    late.release()
    assert mine.entries(GPU) == []


def test_adding_without_the_mutex_is_a_mistake(open_tables):
    with pytest.raises(AssertionError):
        open_tables().add(GPU, Kind.RUN, limit=1, reserved=0, since=0.0)


def test_no_descriptor_is_left_open(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    tables = LeaseTables([GPU, OTHER], tmp_path / "leases")
    for _ in range(3):
        add(tables)
    tables.close()
    tables.close()
    (tmp_path / "leases" / "bad.leases").mkdir()
    for _ in range(3):
        with pytest.raises(LeaseError):
            LeaseTables([GPU, "bad"], tmp_path / "leases")
    assert len(os.listdir("/proc/self/fd")) == before


def test_reading_is_cheap(open_tables):
    uuids = [f"GPU-{n}" for n in range(8)]
    holder, reader = open_tables(uuids), open_tables(uuids)
    for uuid in uuids * 4:
        add(holder, uuid)
    times = []
    for _ in range(50):
        start = time.perf_counter()
        assert sum(len(reader.entries(uuid)) for uuid in uuids) == 32
        times.append(time.perf_counter() - start)
    assert min(times) < 0.001


# --- the mutex ---


def test_a_mutex_that_is_taken_returns_false_at_once_and_takes_none(open_tables):
    both, first, second = open_tables([GPU, OTHER]), open_tables([GPU]), open_tables([OTHER])
    assert second.try_lock()
    start = time.perf_counter()
    assert not both.try_lock()
    assert time.perf_counter() - start < 0.1
    assert first.try_lock()
    first.unlock()
    second.unlock()
    second.unlock()
    assert both.try_lock()
    assert not first.try_lock()
    assert not second.try_lock()
    both.close()
    assert first.try_lock()


def test_the_holder_is_named_while_it_holds(open_tables):
    mine, others = open_tables(), open_tables()
    assert mine.try_lock()
    assert f"process {os.getpid()} of user {os.getuid()}" in others.holder_hint()
    mine.unlock()
    assert others.holder_hint() == "by nobody any more"


_HOSTILE = """
    tables = LeaseTables(["GPU-aaaa"], directory)
    with open(directory / "GPU-aaaa.leases", "r+b") as file:
        fcntl.fcntl(file, 37, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0))
        say("held")
        time.sleep(60)
"""


def test_a_hostile_holder_of_everything_hogs_and_is_not_mistaken_for_another(open_tables, tmp_path):
    tables = open_tables()
    assert tables.try_lock()
    tables.unlock()
    with python(_HOSTILE, tmp_path / "leases") as hostile:
        assert hostile.stdout.readline() == "held\n"
        start = time.perf_counter()
        assert not tables.try_lock()
        assert time.perf_counter() - start < 0.1
        hint = tables.holder_hint()
        assert "left no name" in hint
        assert str(table_path(tmp_path / "leases")) in hint
        hostile.kill()
        hostile.wait()
        assert tables.try_lock()


def test_a_holder_of_the_mutex_that_is_killed_frees_it(open_tables, tmp_path):
    tables = open_tables()
    code = """
        tables = LeaseTables(["GPU-aaaa"], directory)
        say(tables.try_lock())
        time.sleep(60)
    """
    with python(code, tmp_path / "leases") as holder:
        assert holder.stdout.readline() == "True\n"
        assert not tables.try_lock()
        assert f"process {holder.pid} " in tables.holder_hint()
        holder.kill()
        holder.wait()
        assert tables.try_lock()


# --- many processes ---

_HAMMER = """
    import mmap
    counts = mmap.mmap(int(sys.argv[2]), 8)
    uuids, limit = ["GPU-aaaa", "GPU-bbbb"], 3
    tables = LeaseTables(uuids, directory)
    held, done, most = [], 0, 0
    def count(uuid, step):
        # Its own lock, and one that knows nothing of the tables.
        at = 4 * uuids.index(uuid)
        fcntl.lockf(int(sys.argv[2]), fcntl.LOCK_EX)
        (value,) = struct.unpack_from("<i", counts, at)
        struct.pack_into("<i", counts, at, value + step)
        fcntl.lockf(int(sys.argv[2]), fcntl.LOCK_UN)
        return value + step
    while done < 200:
        if held and random.random() < 0.6:
            lease = held.pop(random.randrange(len(held)))
            count(lease.uuid, -1)
            lease.release()
            done += 1
            continue
        locked(tables)
        uuid = random.choice(uuids)
        entries = [e for e in tables.entries(uuid) if e.kind is Kind.RUN]
        assert all(e.limit == limit and e.reserved == 7 for e in entries), entries
        assert len(entries) <= limit, entries
        if len(entries) < limit:
            held.append(tables.add(uuid, Kind.RUN, limit=limit, reserved=7, since=1.0))
            now = count(uuid, +1)
            most = max(most, now)
            assert now <= limit, now
        tables.unlock()
        time.sleep(random.random() * 0.001)
    for lease in held:
        count(lease.uuid, -1)
        lease.release()
    say(done, most)
"""


def test_eight_processes_never_have_more_than_the_limit(tmp_path, open_tables):
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(tempfile.TemporaryFile())
        file.truncate(8)
        options = {"pass_fds": [file.fileno()]}
        processes = [
            stack.enter_context(python(_HAMMER, tmp_path / "leases", file.fileno(), **options))
            for _ in range(8)
        ]
        answers = [process.communicate(timeout=120)[0].split() for process in processes]
        assert [process.returncode for process in processes] == [0] * 8
        with mmap.mmap(file.fileno(), 8) as counts:
            assert struct.unpack("<2i", counts[:]) == (0, 0)
    # Each is an addition and a release.
    assert 2 * sum(int(done) for done, _ in answers) >= 2000
    assert max(int(most) for _, most in answers) == 3
    tables = open_tables([GPU, OTHER])
    assert tables.entries(GPU) == tables.entries(OTHER) == []


_RESTLESS = """
    tables = LeaseTables(["GPU-aaaa"], directory)
    held = [add(tables)]
    say("ready")
    while True:
        locked(tables)
        held.append(tables.add("GPU-aaaa", Kind.RUN, limit=3, reserved=7, since=1.5))
        held[-1].update(reserved=random.randrange(100), root=os.getpid())
        tables.unlock()
        while len(held) > random.randrange(1, 4):
            held.pop(0).release()
"""


def test_holders_that_are_killed_at_any_moment_leave_nothing(tmp_path, open_tables):
    tables = open_tables()
    for _ in range(4):
        with contextlib.ExitStack() as stack:
            crowd = [stack.enter_context(python(_RESTLESS, tmp_path / "leases")) for _ in range(4)]
            assert all(process.stdout.readline() == "ready\n" for process in crowd)
            for process in crowd:
                time.sleep(random.random() * 0.05)
                process.send_signal(signal.SIGKILL)
                # Whoever is left goes on, and nobody reads anything but what was written.
                assert all(e.limit == 3 and e.launcher for e in tables.entries(GPU))
            for process in crowd:
                process.wait()
        assert gone_within(tables, 1.0)
        assert tables.try_lock()
        tables.unlock()
    add(tables)
    assert [entry.mine for entry in tables.entries(GPU)] == [True]


_ADDER = """
    tables = LeaseTables(["GPU-aaaa"], directory)
    lease = add(tables)
    with socket.socket(fileno=int(sys.argv[2])) as connection:
        socket.send_fds(connection, [b"x"], [lease.fileno()])
    lease.update(root=77)
    say("added")
    time.sleep(60)
"""
_KEEPER = """
    with socket.socket(fileno=int(sys.argv[2])) as connection:
        _, (descriptor,), _, _ = socket.recv_fds(connection, 1, 1)
    if os.fork() == 0:  # a job
        say(os.getpid())
        time.sleep(60)
    say("kept")
    time.sleep(60)
"""


def test_a_lease_lives_in_whoever_was_given_its_descriptor(tmp_path, open_tables):
    tables = open_tables()
    ours, theirs = socket.socketpair()
    with ours, theirs, contextlib.ExitStack() as stack:
        adder, keeper = (
            stack.enter_context(
                python(code, tmp_path / "leases", end.fileno(), pass_fds=[end.fileno()])
            )
            for code, end in ((_ADDER, ours), (_KEEPER, theirs))
        )
        assert adder.stdout.readline() == "added\n"
        words = {keeper.stdout.readline().strip() for _ in range(2)}
        (job,) = words - {"kept"}
        adder.kill()
        adder.wait()
        time.sleep(0.05)
        (entry,) = tables.entries(GPU)
        assert (entry.launcher, entry.root, entry.limit) == (adder.pid, 77, 3)
        keeper.kill()
        keeper.wait()
        assert len(tables.entries(GPU)) == 1
        os.kill(int(job), signal.SIGKILL)
        assert gone_within(tables, 1.0)


def test_a_forked_child_that_closes_what_it_inherited_changes_nothing(tmp_path, open_tables):
    tables = open_tables()
    code = """
        tables = LeaseTables(["GPU-aaaa"], directory)
        lease = add(tables)
        assert tables.try_lock()
        if os.fork() == 0:
            tables.close_inherited()
            tables.unlock()
            lease.release()
            say(os.getpid())
            time.sleep(60)
        time.sleep(60)
    """
    with python(code, tmp_path / "leases") as parent:
        child = int(parent.stdout.readline())
        assert len(tables.entries(GPU)) == 1
        assert not tables.try_lock()
        parent.kill()
        parent.wait()
        try:
            assert gone_within(tables, 1.0)
            assert tables.try_lock()
        finally:
            os.kill(child, signal.SIGKILL)


# --- other users ---

_OTHER_USER = """
    os.umask(0o077)
    nobody()
    tables = LeaseTables(["GPU-aaaa"], directory)
    say(*[e.uid for e in tables.entries("GPU-aaaa")])
    lease = add(tables)
    lease.update(root=5)
    say(*sorted(e.uid for e in tables.entries("GPU-aaaa")))
    sys.stdin.readline()
    assert tables.try_lock()
    say("locked")
    time.sleep(60)
"""


@as_root
@pytest.mark.parametrize("first", ["root", "nobody"])
def test_users_share_the_tables_whoever_made_them_under_whatever_umask(
    everybodys, open_tables, first
):
    directory = everybodys / "leases"
    before = os.umask(0o077)
    try:
        tables = open_tables((GPU,), directory) if first == "root" else None
    finally:
        os.umask(before)
    if tables is not None:
        add(tables)
    with python(_OTHER_USER, directory) as other:
        seen = [other.stdout.readline().split(), other.stdout.readline().split()]
        if tables is None:
            assert seen == [[], [str(NOBODY)]]
            tables = open_tables((GPU,), directory)
            add(tables)
        else:
            assert seen == [["0"], ["0", str(NOBODY)]]
        assert sorted(entry.uid for entry in tables.entries(GPU)) == [0, NOBODY]
        other.stdin.write("\n")
        other.stdin.flush()
        assert other.stdout.readline() == "locked\n"
        assert not tables.try_lock()
        assert f"process {other.pid} of user {NOBODY}" in tables.holder_hint()
        other.kill()
        other.wait()
        assert [entry.uid for entry in tables.entries(GPU)] == [0]
        assert tables.try_lock()
    assert directory.stat().st_mode & 0o7777 == 0o1777
    assert table_path(directory).stat().st_mode & 0o7777 == 0o666


@as_root
def test_many_users_at_once_find_or_make_the_same_tables(everybodys):
    code = """
        os.umask(0o077)
        if int(sys.argv[2]):
            nobody()
        say("ready")
        sys.stdin.readline()
        tables = LeaseTables(["GPU-aaaa"], directory)
        lease = add(tables)
        say("added")
        sys.stdin.readline()
        say(len(tables.entries("GPU-aaaa")))
    """
    with contextlib.ExitStack() as stack:
        crowd = [stack.enter_context(python(code, everybodys / "leases", n % 3)) for n in range(6)]
        for answer in ("ready\n", "added\n"):
            assert [process.stdout.readline() for process in crowd] == [answer] * 6
            for process in crowd:
                process.stdin.write("\n")
                process.stdin.flush()
        assert int(crowd[0].stdout.readline()) == 6


@as_root
def test_a_directory_of_another_user_that_anybody_may_change_is_refused(everybodys, open_tables):
    directory = everybodys / "leases"
    directory.mkdir()
    os.chown(directory, NOBODY, NOBODY)
    directory.chmod(0o777)
    with pytest.raises(LeaseError, match=r"anybody may replace.*sticky.*lease_dir=PATH"):
        open_tables((GPU,), directory)
    directory.chmod(0o1777)
    assert open_tables((GPU,), directory).try_lock()


@as_root
def test_a_directory_that_is_not_for_this_user_gives_a_sentence(everybodys):
    directory = everybodys / "leases"
    directory.mkdir(mode=0o700)
    code = """
        nobody()
        try:
            LeaseTables(["GPU-aaaa"], directory)
        except LeaseError as error:
            say(error)
    """
    with python(code, directory) as other:
        line = other.stdout.readline()
    assert "Permission denied" in line
    assert "hydra.launcher.leases=false" in line


def test_what_another_user_is_just_making_is_waited_for(open_tables, monkeypatch):
    """Between making a file and opening it for everybody its maker alone may open it."""
    refusals, real = [3, 2], os.open

    def not_yet(path, *arguments, **options):
        which = 1 if str(path).endswith(".leases") else 0
        if refusals[which]:
            refusals[which] -= 1
            raise PermissionError(13, "Permission denied")
        return real(path, *arguments, **options)

    monkeypatch.setattr(lease_file.os, "open", not_yet)
    assert open_tables().try_lock()
    assert refusals == [0, 0]


def test_a_file_that_exists_is_never_opened_to_be_made(open_tables, monkeypatch):
    """In a sticky directory the kernel may refuse that for files of other users."""
    open_tables()
    flags, real = [], os.open

    def spy(path, flag, *arguments, **options):
        flags.append(flag)
        return real(path, flag, *arguments, **options)

    monkeypatch.setattr(lease_file.os, "open", spy)
    add(open_tables())
    assert flags
    assert not any(flag & (os.O_CREAT | os.O_TRUNC) for flag in flags)
    assert all(flag & os.O_CLOEXEC for flag in flags)


# --- what should not be there ---


def test_a_directory_that_is_a_link_or_a_file_is_refused(open_tables, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "leases").symlink_to(tmp_path / "real")
    with pytest.raises(LeaseError, match=r"leases is a symbolic link.*lease_dir=PATH.*=false"):
        open_tables()
    (tmp_path / "leases").unlink()
    (tmp_path / "leases").write_text("")
    with pytest.raises(LeaseError, match="leases is not a directory"):
        open_tables()
    with pytest.raises(LeaseError, match="No such file or directory"):
        open_tables((GPU,), tmp_path / "none" / "leases")
    assert list((tmp_path / "real").iterdir()) == []


def test_a_table_that_is_a_link_is_refused_and_its_target_left_alone(open_tables, tmp_path):
    directory, victim = tmp_path / "leases", tmp_path / "victim"
    directory.mkdir()
    victim.write_text("precious")
    victim.chmod(0o600)
    table_path(directory).symlink_to(victim)
    with pytest.raises(LeaseError, match=r"GPU-aaaa\.leases is a symbolic link"):
        open_tables()
    table_path(directory).unlink()
    table_path(directory).symlink_to(tmp_path / "nothing")
    with pytest.raises(LeaseError, match="symbolic link"):
        open_tables()
    table_path(directory).unlink()
    os.link(victim, table_path(directory))
    with pytest.raises(LeaseError, match="other names"):
        open_tables()
    assert victim.read_text() == "precious"
    assert victim.stat().st_mode & 0o777 == 0o600
    assert not (tmp_path / "nothing").exists()


def test_something_else_in_place_of_a_table_is_refused_at_once(open_tables, tmp_path):
    directory = tmp_path / "leases"
    directory.mkdir()
    os.mkfifo(table_path(directory))
    table_path(directory, "dir").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(table_path(directory, "s")))
        start = time.monotonic()
        with pytest.raises(LeaseError, match="not a regular file"):
            open_tables()
        for uuid in ("dir", "s"):
            with pytest.raises(LeaseError, match=r"cannot be used: .*lease_dir=PATH"):
                open_tables([uuid])
        assert time.monotonic() - start < 1


def _lock_like_a_holder(path, index):
    file = path.open("r+b", buffering=0)
    flock = struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, index * SIZE, SIZE, 0)
    fcntl.fcntl(file, 37, flock)
    return file


def test_garbage_that_nobody_holds_is_nothing_and_is_written_over(open_tables, tmp_path):
    directory = tmp_path / "leases"
    directory.mkdir()
    path = table_path(directory)
    path.write_bytes(random.Random(1).randbytes(3 * SIZE + 50))
    tables = open_tables()
    assert tables.entries(GPU) == []
    held = [add(tables) for _ in range(4)]
    assert len(tables.entries(GPU)) == 4
    for lease in held:
        lease.release()
    assert tables.entries(GPU) == []


@pytest.mark.parametrize("content", [b"\xff" * SIZE, b"x", b"orchles1" + b"\1" * (SIZE - 8)])
def test_garbage_that_is_held_counts_as_a_job_that_accepts_no_other(open_tables, tmp_path, content):
    tables = open_tables()
    with _lock_like_a_holder(table_path(tmp_path / "leases"), 1) as file:
        os.pwrite(file.fileno(), content, SIZE)
        assert tables.entries(GPU) == [Entry(Kind.RUN, 0, 0, 0, 1, 0, 0.0, mine=False)]
    assert tables.entries(GPU) == []


def test_a_single_wrong_bit_makes_a_record_garbage(open_tables, tmp_path):
    mine, others = open_tables(), open_tables()
    add(mine, limit=2)
    path = table_path(tmp_path / "leases")
    good = path.read_bytes()
    for at in range(SIZE, 2 * SIZE, 9):
        path.write_bytes(good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :])
        assert [(entry.launcher, entry.limit) for entry in others.entries(GPU)] == [(0, 1)]


def test_a_record_of_a_later_kind_counts_as_a_job_that_accepts_no_other(open_tables, tmp_path):
    tables = open_tables()
    entry = Entry(Kind.RUN, 1, 2, 3, 4, 5, 6.0, mine=False)
    with _lock_like_a_holder(table_path(tmp_path / "leases"), 2) as file:
        os.pwrite(file.fileno(), leases._pack(9, entry), 2 * SIZE)
        assert [(e.kind, e.limit) for e in tables.entries(GPU)] == [(Kind.RUN, 1)]


def test_a_record_that_is_just_being_written_is_read_again(open_tables, monkeypatch):
    mine, others = open_tables(), open_tables()
    add(mine)
    (good,) = others.entries(GPU)
    real = lease_file.RecordFile.read_all

    def torn(self):
        return [record[:64] + bytes(64) for record in real(self)]

    monkeypatch.setattr(lease_file.RecordFile, "read_all", torn)
    assert others.entries(GPU) == [good]


def test_a_table_that_was_cut_short_reads_safely_and_is_used_on(open_tables, tmp_path):
    mine, others = open_tables(), open_tables()
    first, second = add(mine), add(mine)
    path = table_path(tmp_path / "leases")
    os.truncate(path, 2 * SIZE + 40)
    assert [entry.limit for entry in others.entries(GPU)] == [2, 1]
    os.truncate(path, 0)
    assert others.entries(GPU) == []
    second.update(reserved=3)
    assert [entry.reserved for entry in others.entries(GPU)] == [3]
    first.release()
    second.release()
    assert others.entries(GPU) == []


def test_a_table_of_a_terabyte_is_read_no_further_than_it_may_reach(open_tables, tmp_path):
    tables = open_tables()
    os.truncate(table_path(tmp_path / "leases"), 2**40)
    add(tables)
    assert len(tables.entries(GPU)) == 1


def test_a_full_table_is_said_and_is_free_again_later(open_tables):
    tables, others = open_tables(), open_tables()
    fields = {"limit": 1, "reserved": 0, "since": 0.0}
    with contextlib.closing(others._tables[GPU].file.again()) as hog:
        assert all(hog.try_lock(index) for index in range(1, leases.RECORDS))
        assert tables.try_lock()
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(LeaseError, match=r"full \(1023 entries\).*lease_dir=PATH"):
            tables.add(GPU, Kind.RUN, **fields)
        assert len(os.listdir("/proc/self/fd")) == before
        hog.unlock(leases.RECORDS - 1)
        tables.add(GPU, Kind.RUN, **fields)
        assert [entry.mine for entry in tables.entries(GPU)] == [True]


def test_tables_that_are_removed_go_on_for_those_who_have_them(open_tables, tmp_path):
    mine, others = open_tables(), open_tables()
    shutil.rmtree(tmp_path / "leases")
    add(mine)
    assert len(others.entries(GPU)) == 1
    assert open_tables().entries(GPU) == []


def test_a_disk_that_is_full_is_said_and_an_update_is_let_go(open_tables, monkeypatch):
    tables = open_tables()
    lease = add(tables)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lease_file.os, "pwrite", full)
    with pytest.raises(LeaseError, match="No space left on device"):
        add(tables)
    tables.unlock()
    lease.update(reserved=1)
    monkeypatch.undo()
    assert [entry.reserved for entry in tables.entries(GPU)] == [5]
    lease.update(reserved=1)
    assert [entry.reserved for entry in tables.entries(GPU)] == [1]


def test_other_systems_are_told_so(monkeypatch, tmp_path):
    monkeypatch.setattr(lease_file.sys, "platform", "darwin")
    with pytest.raises(LeaseError, match=r"need a 64-bit Linux, and this is darwin.*leases=false"):
        LeaseTables([GPU], tmp_path / "leases")
