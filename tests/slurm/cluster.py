"""A real Slurm on one machine, for tests: simulated nodes with GPUs, and accounting.

    python tests/slurm/cluster.py --run 'sbatch --wrap hostname; sleep 2; sacct'
    python tests/slurm/cluster.py        # stays until Ctrl+C; says what to export

munged, mariadbd, slurmdbd, slurmctld and one slurmd a node run as root on loopback, on random
ports, below one short folder in /tmp. No systemd, no terminal, nothing of the machine's own Slurm.

They are children of a keeper, a process of its own that ends all of them and removes the folder
when its standard input ends: so nothing is left however the process that asked for a cluster
ends, SIGKILL included. The keeper is a subreaper, so what daemonizes below it (slurmstepd and the
processes of jobs) comes back to it.

Standard library only; no import of the project.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import random
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NOT_INSTALLED = "Slurm is not installed: make test-slurm installs it (root, Debian/Ubuntu)"
NOT_ROOT = "Slurm's tests need root: they start its daemons"
PROGRAMS = ("munged", "mariadbd", "mariadb-install-db", "slurmdbd", "slurmctld", "slurmd", "sacct")
START_LIMIT_S = 90.0
CALL_LIMIT_S = 60.0

_SBIN = "/usr/local/sbin:/usr/sbin:/sbin"
_SACCT_FIELDS = (
    "JobID,JobIDRaw,JobName,Partition,User,State,ExitCode,DerivedExitCode,Reason,NodeList,"
    "AllocCPUS,AllocTRES,ElapsedRaw,TimelimitRaw,Submit,Start,End,WorkDir,Comment,MaxRSS"
)
_LIVE = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "REQUEUED"}
_PR_SET_CHILD_SUBREAPER = 36


class SlurmError(RuntimeError):
    """Slurm did not start, or does not do what it was asked."""


def why_not():
    """Why there can be no cluster here, or None."""
    path = f"{os.environ.get('PATH', os.defpath)}:{_SBIN}"
    if sys.platform != "linux" or not all(shutil.which(name, path=path) for name in PROGRAMS):
        return NOT_INSTALLED
    if os.geteuid() != 0:
        return NOT_ROOT
    return None


def until(check, timeout=30.0, what="", pause=0.05):
    """What `check()` returns, once that is true."""
    end = time.monotonic() + timeout
    while not (value := check()):
        if time.monotonic() > end:
            raise SlurmError(f"Waited {timeout:g} s in vain: {what or check}")
        time.sleep(pause)
    return value


def parse(table):
    """The rows of a table of Slurm's (`--parsable2`), by the names in its first line."""
    header, *lines = table.splitlines()
    names = header.split("|")
    return [dict(zip(names, line.split("|"), strict=False)) for line in lines]


def expand(jobid):
    """Ids of tasks: "7_[1-3,5%2]" is what Slurm calls those of an array that share a state."""
    job, bracket, tasks = jobid.rstrip("]").partition("_[")
    if not bracket:
        return [jobid]
    found = []
    for part in tasks.partition("%")[0].split(","):
        first, _, last = part.partition("-")
        found += [f"{job}_{task}" for task in range(int(first), int(last or first) + 1)]
    return found


def processes():
    """Parents by pid, zombies left out."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError, ValueError):
                # The name in brackets may hold spaces and brackets.
                state, parent = (
                    Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()[:2]
                )
                if state not in "ZX":
                    found[int(entry)] = int(parent)
    return found


def descendants(pid):
    parents = processes()
    children = {}
    for child, parent in parents.items():
        children.setdefault(parent, []).append(child)
    found = []
    rest = [pid]
    while rest:
        below = children.get(rest.pop(), [])
        found += below
        rest += below
    return found


class Cluster:
    """A cluster, up between `start()` and `stop()`; also a context manager.

    `conf` holds lines of slurm.conf to add or replace, by their key.
    """

    def __init__(self, *, nodes=4, cpus=8, gpus=2, conf=None):
        self.nodes = tuple(f"node{number}" for number in range(1, nodes + 1))
        self._wanted = {"nodes": nodes, "cpus": cpus, "gpus": gpus, "conf": dict(conf or {})}
        self._keeper = None
        self.folder = None
        self.env = {}
        self.start_s = self.stop_s = None

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.stop()

    # Up and down.

    def start(self):
        assert self._keeper is None
        if reason := why_not():
            raise SlurmError(reason)
        began = time.monotonic()
        # Not in TMPDIR: a socket's path holds 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self._keeper = subprocess.Popen(
            # -I: nothing from the environment or the folder of this file; -S: starts faster.
            [sys.executable, "-I", "-S", __file__, "--keep", str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        try:
            told = self._ask(self._wanted)
        except BaseException:
            self.stop()
            raise
        self.env = {
            **{key: value for key, value in os.environ.items() if not _is_slurms(key)},
            **told["env"],
        }
        self.start_s = time.monotonic() - began
        return self

    def stop(self):
        """Ends everything, jobs included; nothing to do the second time."""
        keeper, self._keeper = self._keeper, None
        if keeper is None:
            return
        began = time.monotonic()
        with contextlib.suppress(OSError):
            keeper.stdin.close()
        try:
            keeper.wait(timeout=30)
        finally:
            keeper.stdout.close()
            if keeper.returncode is None:
                keeper.kill()
                keeper.wait()
        self.stop_s = time.monotonic() - began
        self.env = {}

    def _ask(self, request):
        assert self._keeper is not None, "the cluster is not up"
        try:
            self._keeper.stdin.write(json.dumps(request) + "\n")
            self._keeper.stdin.flush()
            answer = self._keeper.stdout.readline()
        except BrokenPipeError:
            answer = ""
        reply = json.loads(answer) if answer else {"error": "the cluster's keeper died"}
        if "error" in reply:
            raise SlurmError(reply["error"])
        return reply

    # Commands.

    def run(self, *words, check=True, timeout=CALL_LIMIT_S, **options):
        """Runs a command in the cluster's environment; its output is text."""
        options = {"env": self.env, "stdin": subprocess.DEVNULL, "capture_output": True} | options
        words = [str(word) for word in words]
        done = subprocess.run(words, text=True, timeout=timeout, check=False, **options)
        if check and done.returncode:
            raise SlurmError(f"{' '.join(words)}: {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def sbatch(self, *words, script=None):
        """Submits a job and returns its id; `script` is the text of one."""
        extra = {} if script is None else {"input": script, "stdin": None}
        output = self.run("sbatch", "--parsable", *words, **extra).stdout
        return output.strip().split(";")[0]

    def scontrol(self, *words):
        return self.run("scontrol", *words).stdout

    def squeue(self, *words):
        """Jobs in the queue, one row an array's task: JOBID, STATE, REASON, NODELIST, NAME."""
        form = "%i|%T|%r|%N|%j"
        table = self.run("squeue", "--array", "--format", form, *words).stdout
        return parse(table)

    def sacct(self, *ids, fields=_SACCT_FIELDS, steps=False):
        """What accounting says of these jobs (all, without ids), one row a job or task.

        Of tasks that were cancelled before they started there may be only a row with the id of
        the array.
        """
        words = ["sacct", "--parsable2", "--format", fields]
        words += ["--jobs", ",".join(map(str, ids))] if ids else ["--starttime", "now-1days"]
        # Unlimited: by default what is in brackets is cut after 64 characters.
        table = self.run(*words, env={**self.env, "SLURM_BITSTR_LEN": "0"}).stdout
        rows = [row | {"JobID": jobid} for row in parse(table) for jobid in expand(row["JobID"])]
        return rows if steps else [row for row in rows if "." not in row["JobID"]]

    def job(self, jobid):
        """What slurmctld knows of a job (`scontrol show job`); empty once it forgot it."""
        done = self.run("scontrol", "--oneliner", "show", "job", jobid, check=False)
        return dict(re.findall(r"(\S+?)=(\S*)", done.stdout)) if done.returncode == 0 else {}

    def wait(self, *ids, timeout=60.0):
        """Rows of `sacct`, once all these jobs (and all tasks of these arrays) ended."""

        def rows():
            # slurmctld first: accounting hears of it later, of an array not all at once.
            queue = self.squeue("--states=all")
            tasks = {row["JOBID"] for row in queue} & wanted
            tasks |= {row["JOBID"] for row in queue if row["JOBID"].split("_")[0] in wanted}
            if any(row["JOBID"] in tasks and row["STATE"] in _LIVE for row in queue):
                return None
            found = self.sacct(*ids)
            ended = all(row["End"] not in {"", "Unknown"} for row in found)
            known = {row["JobID"] for row in found}
            known |= {jobid.split("_")[0] for jobid in known}
            return found if ended and tasks | wanted <= known else None

        wanted = {str(jobid) for jobid in ids}
        return until(rows, timeout, f"jobs {sorted(wanted)} to end", pause=0.1)

    def cancel_all(self, timeout=30.0):
        """Ends all jobs; what ignores SIGTERM gets SIGKILL at once."""

        def gone():
            if not self.squeue():
                return True
            for pid in self._of_jobs():
                _kill(pid, signal.SIGKILL)
            return False

        if self.squeue():
            # The ones that wait first: none of them may start meanwhile.
            self.run("scancel", "--state=PENDING", "--user=root", check=False)
            self.run("scancel", "--user=root", check=False)
        until(gone, timeout, "the queue to be empty", pause=0.1)

    def reset(self):
        """As at the start: all daemons up, no shims, no jobs, all nodes idle."""
        for shim in (self.folder / "bin").iterdir():
            shim.unlink()
        self._ask({"mend": True})
        self.cancel_all()
        self.resume(*self.nodes)
        idle = dict.fromkeys(self.nodes, "IDLE")
        until(lambda: self.node_states() == idle, what="all nodes to be idle")

    # Nodes.

    def node_states(self):
        """As slurmctld says: IDLE, MIXED, ALLOCATED, IDLE+DRAIN, DOWN and so on."""
        output = self.scontrol("--oneliner", "show", "node")
        return dict(re.findall(r"^NodeName=(\S+).*? State=(\S+)", output, re.MULTILINE))

    def drain(self, node, reason="test"):
        """Its jobs go on, no other starts."""
        self.scontrol("update", f"nodename={node}", "state=drain", f"reason={reason}")

    def down(self, node, reason="test"):
        """Its jobs end, NODE_FAIL, and are requeued where they may be."""
        self.scontrol("update", f"nodename={node}", "state=down", f"reason={reason}")

    def resume(self, *nodes):
        """Back from `drain` and `down`."""

        def back():
            states = self.node_states()
            out = [node for node in nodes if re.search(r"DRAIN|DOWN|\*", states[node])]
            if out:
                self.run(
                    *("scontrol", "update", f"nodename={','.join(out)}", "state=resume"),
                    check=False,
                )
            return not out and not any("NOT_RESPONDING" in states[node] for node in nodes)

        until(back, what=f"{nodes} to come back", pause=0.1)

    # Faults.

    @contextlib.contextmanager
    def shim(self, program, script):
        """A script in place of a program of Slurm's, also for what already runs."""
        path = self.folder / "bin" / program
        new = self.folder / f"{program}.new"
        new.write_text(script)
        new.chmod(0o755)
        new.replace(path)
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def without_sacct(self, how="disabled"):
        """Accounting is not configured ("disabled"), "down", or does not answer ("hangs")."""
        if how == "hangs":
            with self.frozen("slurmdbd"):
                yield
        else:
            # The real sacct with another slurm.conf: slurmctld takes 10 s and more to find a
            # slurmdbd that was away (`stopped("slurmdbd")`).
            real = shutil.which("sacct", path=self.env["PATH"])
            conf = self.folder / f"accounting-{how}.conf"
            assert conf.exists(), how
            with self.shim("sacct", f'#!/bin/sh\nSLURM_CONF={conf} exec {real} "$@"\n'):
                yield

    @contextlib.contextmanager
    def stopped(self, daemon):
        """A daemon is down: slurmctld, slurmdbd, or the slurmd of a node, by the node's name."""
        self._ask({"stop": daemon})
        try:
            yield
        finally:
            self._ask({"start": daemon})

    @contextlib.contextmanager
    def frozen(self, daemon):
        """A daemon does not answer."""
        pid = self._ask({"pid": daemon})["pid"]
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            _kill(pid, signal.SIGCONT)

    def job_processes(self, jobid, match=""):
        """Pids of a job's (or array task's) own processes, by what their command lines hold.

        Neither slurmstepd and srun, nor the shell of the batch script if it has started any.
        """
        found = {}
        for pid, env in self._of_jobs().items():
            task = f"{env.get('SLURM_ARRAY_JOB_ID')}_{env.get('SLURM_ARRAY_TASK_ID')}"
            if str(jobid) in {env["SLURM_JOB_ID"], task}:
                found[pid] = _command(pid)
        own = [pid for pid, words in found.items() if "slurm_script" not in words]
        return [pid for pid in own or found if match in found[pid]]

    def kill_job_process(self, jobid, number=signal.SIGKILL, match="", timeout=10.0):
        """Signals these processes of a job behind Slurm's back, and returns their pids."""
        pids = until(lambda: self.job_processes(jobid, match), timeout, f"processes of {jobid}")
        for pid in pids:
            _kill(pid, number)
        return pids

    def _of_jobs(self):
        """Environments, by pid, of what jobs run on all nodes."""
        found = {}
        for pid in descendants(self._keeper.pid):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/comm").read_text().strip() in {"slurmstepd", "srun"}:
                    continue
                lines = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
                env = dict(line.partition("=")[::2] for line in lines.split("\0"))
                if "SLURM_JOB_ID" in env:
                    found[pid] = env
        return found


def _is_slurms(key):
    # A job of the machine's own Slurm may be what runs the tests.
    return key.startswith(("SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "SALLOC_", "SACCT", "SQUEUE_"))


def _kill(pid, number):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _command(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
    except OSError:
        return ""


# The keeper: a process of its own.


def _ports(number):
    """Free ports, below those that the kernel gives to connections."""
    with contextlib.ExitStack() as stack:
        found = []
        while len(found) < number:
            port = random.SystemRandom().randrange(12000, 32000)
            taken = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                taken.bind(("127.0.0.1", port))
                found.append(port)
        return found


class _Keeper:
    def __init__(self, folder, wanted):
        self.folder = folder
        self.host = socket.gethostname().split(".")[0]
        self.name = folder.name.replace("-", "").replace("_", "").lower()
        self.nodes = [f"node{number}" for number in range(1, wanted["nodes"] + 1)]
        self.dbd_port, self.ctld_port, *self.node_ports = _ports(2 + len(self.nodes))
        self.munge = folder / "munge.socket"
        self.mysql = folder / "mysql.socket"
        self.told = {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{folder / 'bin'}:{os.environ.get('PATH', os.defpath)}:{_SBIN}",
        }
        self.env = {
            **{key: value for key, value in os.environ.items() if not _is_slurms(key)},
            **self.told,
            # libmariadb's own name for its socket: the database needs no port.
            "MYSQL_UNIX_PORT": str(self.mysql),
            # Two databases that are installed at once mix up their temporary tables in /tmp.
            "TMPDIR": str(folder / "tmp"),
            # The default of 64 arenas is memory for nothing here.
            "MALLOC_ARENA_MAX": "2",
        }
        (folder / "tmp").mkdir()
        self.running = {}
        self.write(wanted)
        self.commands = {
            "munged": [
                *("munged", "--foreground", "--force", f"--socket={self.munge}"),
                *(f"--key-file={folder / 'munge.key'}", f"--seed-file={folder / 'munge.seed'}"),
                *(f"--pid-file={folder / 'munge.pid'}", f"--log-file={folder / 'munge.log'}"),
                "--num-threads=2",
            ],
            "mariadbd": [
                *("mariadbd", "--no-defaults", "--user=root", f"--datadir={folder / 'mysql'}"),
                *("--skip-networking", f"--socket={self.mysql}", "--skip-log-bin"),
                *("--innodb-buffer-pool-size=16M", "--innodb-log-file-size=16M"),
                *("--innodb-flush-method=nosync", "--innodb-flush-log-at-trx-commit=0"),
                *("--debug-no-sync", "--innodb-doublewrite=0"),
                *("--innodb-lock-wait-timeout=900", "--performance-schema=OFF"),
            ],
            "slurmdbd": ["slurmdbd", "-D"],
            "slurmctld": ["slurmctld", "-D"],
            **{node: ["slurmd", "-D", "-N", node] for node in self.nodes},
        }

    def write(self, wanted):
        folder, run = self.folder, self.folder / "run"
        for name in ("bin", "run", "state"):
            (folder / name).mkdir()
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o400)
        auth = {"AuthType": "auth/munge", "AuthInfo": f"socket={self.munge},cred_expire=10"}
        conf = {
            "ClusterName": self.name,
            "SlurmctldHost": f"{self.host}(127.0.0.1)",
            "SlurmctldPort": self.ctld_port,
            "SlurmUser": "root",
            "SlurmdUser": "root",
            **auth,
            "CommunicationParameters": "NoCtldInAddrAny,NoInAddrAny",
            "StateSaveLocation": folder / "state",
            "SlurmdSpoolDir": run / "%n",
            "SlurmctldPidFile": run / "slurmctld.pid",
            "SlurmdPidFile": run / "%n.pid",
            "SlurmctldLogFile": folder / "slurmctld.log",
            "SlurmdLogFile": folder / "%n.log",
            "SlurmdParameters": "config_overrides",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "MpiDefault": "none",
            "MailProg": "/bin/true",
            "ReturnToService": 2,
            "KillWait": 5,
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_CPU_Memory",
            "SchedulerParameters": (
                "batch_sched_delay=0,sched_min_interval=100000,sched_interval=2,bf_interval=1"
            ),
            # Ids of two clusters differ: a stale one is nobody's.
            "FirstJobId": random.SystemRandom().randrange(1000, 1_000_000),
            "GresTypes": "gpu",
            "MaxArraySize": 30,
            "DefMemPerCPU": 100,
            "JobAcctGatherType": "jobacct_gather/linux",
            "AccountingStorageType": "accounting_storage/slurmdbd",
            "AccountingStorageHost": "127.0.0.1",
            "AccountingStoragePort": self.dbd_port,
            "AccountingStoragePass": self.munge,
            "AccountingStorageTRES": "gres/gpu",
            **wanted["conf"],
        }
        gpus = f"Gres=gpu:{wanted['gpus']} " if wanted["gpus"] else ""
        tail = [
            f"NodeName={node} NodeHostname={self.host} NodeAddr=127.0.0.1 Port={port} "
            f"CPUs={wanted['cpus']} RealMemory=64000 {gpus}State=UNKNOWN"
            for node, port in zip(self.nodes, self.node_ports, strict=True)
        ]
        tail.append(
            f"PartitionName=main Nodes={','.join(self.nodes)} Default=YES MaxTime=INFINITE "
            "DefaultTime=60 OverSubscribe=NO State=UP"
        )
        _write_conf(folder / "slurm.conf", conf, tail)
        _write_conf(folder / "accounting-down.conf", conf | {"AccountingStoragePort": 1}, tail)
        for key in [key for key in conf if key.startswith("Accounting")]:
            del conf[key]
        _write_conf(folder / "accounting-disabled.conf", conf, tail)
        # Slurm wants devices; what is behind them is nobody's business here.
        devices = [folder / f"nvidia{number}" for number in range(wanted["gpus"])]
        for device in devices:
            os.mknod(device, 0o666 | 0o020000, os.makedev(1, 3))
        lines = [f"Name=gpu File={device}" for device in devices]
        (folder / "gres.conf").write_text("\n".join(["AutoDetect=off", *lines, ""]))
        (folder / "cgroup.conf").write_text("")
        dbd = {
            **auth,
            "SlurmUser": "root",
            "DbdHost": self.host,
            "DbdAddr": "127.0.0.1",
            "DbdPort": self.dbd_port,
            "CommunicationParameters": "NoInAddrAny",
            "LogFile": folder / "slurmdbd.log",
            "PidFile": run / "slurmdbd.pid",
            "StorageType": "accounting_storage/mysql",
            "StorageHost": "localhost",
            "StorageUser": "root",
            "StorageLoc": "slurm",
        }
        _write_conf(folder / "slurmdbd.conf", dbd, [])
        (folder / "slurmdbd.conf").chmod(0o600)

    # Daemons.

    def start(self, name):
        with (self.folder / f"{name}.out").open("ab") as log:
            self.running[name] = subprocess.Popen(
                self.commands[name],
                cwd=self.folder,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def kill(self, name):
        process = self.running.pop(name, None)
        if process is not None:
            process.kill()
            process.wait()

    def stop(self, name):
        """Lets a daemon save its state: what slurmctld has not saved is lost, jobs included."""
        with contextlib.suppress(KeyError, subprocess.TimeoutExpired):
            self.running[name].terminate()
            self.running[name].wait(timeout=10)
        self.kill(name)

    def call(self, *words):
        return subprocess.run(
            words,
            env=self.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=START_LIMIT_S,
            check=False,
        )

    def until(self, name, check):
        """Waits for a daemon, unless it died."""

        def done():
            code = self.running[name].poll() if name in self.running else None
            if code is not None:
                raise SlurmError(f"{name} ended with {code}")
            # Nobody writes before an answer: what there is to read is the end.
            if select.select([sys.stdin], [], [], 0)[0]:
                raise SlurmError("nobody waits for it any more")
            return check()

        until(done, START_LIMIT_S, f"{name} to be up", pause=0.02)

    def up(self, name):
        """Waits until a daemon does its work."""
        ports = dict(zip(self.nodes, self.node_ports, strict=True), slurmdbd=self.dbd_port)
        if name == "slurmctld":
            self.until(name, lambda: not self.call("scontrol", "ping").returncode)
        elif name in {"munged", "mariadbd"}:
            path = self.munge if name == "munged" else self.mysql
            self.until(name, lambda: _answers(path))
        else:
            self.until(name, lambda: _answers(("127.0.0.1", ports[name])))

    def start_all(self):
        self.start("munged")
        self.install_database()
        self.start("mariadbd")
        self.up("munged")
        self.up("mariadbd")
        self.start("slurmdbd")
        self.up("slurmdbd")
        added = self.call("sacctmgr", "-i", "add", "cluster", self.name)
        if added.returncode:
            raise SlurmError(f"sacctmgr: {added.stdout}{added.stderr}")
        self.start("slurmctld")
        for node in self.nodes:
            self.start(node)
        self.up("slurmctld")
        self.until("slurmctld", self.all_idle)
        self.until("slurmctld", self.is_registered)

    def install_database(self):
        made = self.call(
            *("mariadb-install-db", "--no-defaults", "--user=root", "--skip-test-db"),
            *("--auth-root-authentication-method=normal", f"--datadir={self.folder / 'mysql'}"),
            *("--innodb-log-file-size=16M", "--innodb-flush-method=nosync", "--debug-no-sync"),
        )
        if made.returncode:
            raise SlurmError(f"mariadb-install-db: {made.stdout}{made.stderr}")

    def all_idle(self):
        states = self.call("sinfo", "--noheader", "--Node", "--format=%T").stdout.split()
        return states == ["idle"] * len(self.nodes)

    def is_registered(self):
        """Does slurmdbd know where slurmctld is?"""
        words = ("sacctmgr", "--noheader", "--parsable2", "show", "cluster", "format=ControlPort")
        return self.call(*words).stdout.strip() not in {"", "0"}

    # Life.

    def serve(self):
        """Answers until standard input ends."""
        while True:
            ready, _, _ = select.select([sys.stdin], [], [], 1.0)
            self.reap()
            if not ready:
                continue
            # One request, one answer: a line is all there can be to read.
            line = sys.stdin.readline()
            if not line:
                return
            try:
                reply = self.answer(json.loads(line))
            except Exception as error:
                reply = {"error": f"{error}{self.logs()}"}
            _say(reply)

    def reap(self):
        """Takes in what daemonized and ended; the daemons' ends are `Popen`'s to see."""
        daemons = {process.pid for process in self.running.values()}
        for process in self.running.values():
            process.poll()
        with contextlib.suppress(ChildProcessError):
            while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                if ended.si_pid in daemons:
                    return
                os.waitpid(ended.si_pid, 0)

    def answer(self, request):
        if "pid" in request:
            return {"pid": self.running[request["pid"]].pid}
        if "stop" in request:
            self.stop(request["stop"])
        elif "start" in request:
            self.revive(request["start"])
        elif "mend" in request:
            for name in self.commands:
                process = self.running.get(name)
                if process is not None and process.poll() is None:
                    process.send_signal(signal.SIGCONT)
                else:
                    self.revive(name)
        return {}

    def revive(self, name):
        if name not in self.running or self.running[name].poll() is not None:
            self.start(name)
            self.up(name)

    def logs(self):
        """The ends of all logs."""
        texts = []
        for path in sorted([*self.folder.glob("*.out"), *self.folder.glob("*.log")]):
            lines = path.read_text(errors="replace").splitlines()[-8:]
            if lines:
                texts.append("\n".join([f"\n--- {path.name}", *lines]))
        return "".join(texts)

    def end(self):
        """Kills everything below, first what starts processes; there is no state to save."""
        for name in [*self.nodes, "slurmctld"]:
            self.kill(name)
        with contextlib.suppress(ChildProcessError):
            while True:
                for pid in descendants(os.getpid()):
                    _kill(pid, signal.SIGKILL)
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
                time.sleep(0.005)


def _write_conf(path, conf, lines):
    path.write_text("\n".join([*(f"{key}={value}" for key, value in conf.items()), *lines, ""]))


def _answers(address):
    kind = socket.AF_INET if isinstance(address, tuple) else socket.AF_UNIX
    with socket.socket(kind) as client, contextlib.suppress(OSError):
        client.connect(address if isinstance(address, tuple) else str(address))
        return True
    return False


def _say(reply):
    # Nobody may be there to read it.
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps(reply), flush=True)


def _keep(folder):
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # The end of standard input is the only order to end, save for SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    keeper = None
    try:
        wanted = json.loads(sys.stdin.readline())
        keeper = _Keeper(folder, wanted)
        try:
            keeper.start_all()
        except Exception as error:
            _say({"error": f"Slurm did not start: {error}{keeper.logs()}"})
            return
        _say({"env": keeper.told})
        keeper.serve()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if keeper is not None:
            keeper.end()
        shutil.rmtree(folder, ignore_errors=True)


def main():
    parser = argparse.ArgumentParser(
        description="A Slurm of simulated nodes, as root, on loopback."
    )
    parser.add_argument(
        "--run", metavar="COMMAND", help="a line for bash; without it: until Ctrl+C"
    )
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--cpus", type=int, default=8, help="on each node")
    parser.add_argument("--gpus", type=int, default=2, help="on each node")
    parser.add_argument("--keep", type=Path, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.keep is not None:
        return _keep(words.keep)
    if reason := why_not():
        return reason
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    cluster = Cluster(nodes=words.nodes, cpus=words.cpus, gpus=words.gpus)
    try:
        with cluster:
            if words.run is not None:
                return subprocess.run(
                    ["bash", "-c", words.run], env=cluster.env, check=False
                ).returncode
            print(f"Slurm is up, after {cluster.start_s:.1f} s. Ctrl+C ends it. Elsewhere:\n")
            for key in ("SLURM_CONF", "PATH"):
                print(f"    export {key}={cluster.env[key]}", flush=True)
            signal.pause()
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
