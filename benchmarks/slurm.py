"""What a sweep on Slurm costs: ours beside hydra-submitit-launcher's, on one real cluster.

    python benchmarks/slurm.py [--jobs 60] [--repeats 3] [--peers DIR] [--keep DIR]

A Slurm of 4 simulated nodes with 8 CPUs each comes up on this machine (`tests/slurm/cluster.py`;
it needs root and `tests/slurm/install.sh`). Each contender runs the no-op app of
`benchmarks/launch.py` as one array of N jobs and waits for all of them: ours by
``hydra/launcher=slurm``, upstream by ``hydra/launcher=submitit_slurm`` in an environment of its
own without our package. They alternate over the repeats, after one unmeasured round with one job.
Every job's directory must hold its own config and result: N of N, or the benchmark ends.

**Wall** is from the start of the command to its end. **CPU** is that of the command's process tree and,
beside it, of the whole cluster: its daemons and all processes of all jobs.

The exit code is 1 if ours takes more than 0.7 of upstream's wall time.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peers as environments
import report
from contenders import Arena, Contender, check_results, multirun_words, seeds
from goals import Goal

if TYPE_CHECKING:
    from types import ModuleType

REQUIRED = 0.7
_TICKS = os.sysconf("SC_CLK_TCK")


def main() -> int:
    options = parse()
    cluster_module = load_cluster()
    if reason := cluster_module.why_not():
        sys.exit(reason)
    peers = environments.make(options.peers, torch=False)
    report.print_machine(report.describe(peers))
    contenders = make_contenders(peers)
    folder = nullcontext(options.keep) if options.keep else tempfile.TemporaryDirectory()
    with folder as root, cluster_module.Cluster(conf={"MaxArraySize": 1001}) as cluster:
        # Its tools are found, and its configuration, by whatever this process starts.
        os.environ.update(cluster.env)
        arena = Arena(Path(root).absolute(), "noop.py")
        figures = compare(contenders, arena, cluster, options.jobs, options.repeats)
    show(contenders, figures, options.jobs)
    wall = [statistics.median(run["wall"] for run in figures[each.name]) for each in contenders]
    goal = Goal(
        f"wall of {options.jobs} no-op runs: slurm / submitit_slurm", wall[0] / wall[1], REQUIRED
    )
    report.print_goals([goal])
    return 0 if goal.passed else 1


def parse() -> argparse.Namespace:
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=60, help="jobs of the sweep")
    parser.add_argument("--repeats", type=int, default=3, help="measured rounds")
    parser.add_argument("--peers", type=Path, default=here / ".peers", help="their environments")
    parser.add_argument("--keep", type=Path, help="keep apps and last outputs in this folder")
    return parser.parse_args()


def load_cluster() -> ModuleType:
    path = Path(__file__).resolve().parent.parent / "tests" / "slurm" / "cluster.py"
    spec = importlib.util.spec_from_file_location("slurm_cluster", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["slurm_cluster"] = module
    spec.loader.exec_module(module)
    return module


def make_contenders(peers: environments.Peers) -> list[Contender]:
    def ours(app: str, jobs: int, out: Path) -> list[str]:
        words = ("hydra/sweeper=grid", "hydra/launcher=slurm", seeds(jobs))
        return multirun_words(sys.executable, app, out, *words)

    def upstream(app: str, jobs: int, out: Path) -> list[str]:
        words = ("hydra/launcher=submitit_slurm", seeds(jobs))
        return multirun_words(peers.python("submitit"), app, out, *words)

    return [
        Contender("slurm", ours, note="hydra/launcher=slurm, grid sweeper"),
        Contender("submitit_slurm", upstream, note="hydra-submitit-launcher, basic sweeper"),
    ]


def compare(
    contenders: list[Contender], arena: Arena, cluster: Any, jobs: int, repeats: int
) -> dict[str, list[dict[str, float]]]:
    figures: dict[str, list[dict[str, float]]] = {each.name: [] for each in contenders}
    for number in range(repeats + 1):
        for contender in contenders:
            what = f"round {number} of {repeats}" if number else "warming up"
            print(f"{what}: {contender.name}", file=sys.stderr, flush=True)
            before = cluster_cpu(cluster)
            usage = run(contender, arena, jobs if number else 1)
            cluster.reset()  # all of its jobs are over, to the last process
            if number:
                spent = cluster_cpu(cluster) - before
                figures[contender.name].append({**usage, "cluster": spent})
    return figures


def run(contender: Contender, arena: Arena, jobs: int) -> dict[str, float]:
    """One sweep, its results checked: seconds of wall time, and of CPU of its own processes."""
    shutil.rmtree(arena.out, ignore_errors=True)
    words = contender.words(arena.app, jobs, arena.out)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with arena.log.open("wb") as output:
        start = time.perf_counter()
        done = subprocess.run(
            words,
            cwd=arena.work,
            env=arena.environment(words),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            check=False,
        )
        wall = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"{contender.name} failed:\n{arena.log.read_text(errors='replace')[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    check_results(arena.out, jobs)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall": wall, "cpu": cpu}


def cluster_cpu(cluster: Any) -> float:
    """Seconds of CPU that the cluster's processes, and those that they waited for, have used."""
    total = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
            environ = (path.parent / "environ").read_bytes()
            words = (path.parent / "cmdline").read_bytes()
        except (OSError, ValueError):
            continue
        if str(cluster.folder).encode() in environ + words and b"benchmarks/slurm" not in words:
            total += sum(map(int, fields[11:15]))
    return total / _TICKS


def show(contenders: list[Contender], figures: dict[str, Any], jobs: int) -> None:
    rows = []
    for contender in contenders:
        runs = figures[contender.name]
        row = [
            f"{statistics.median(run[what] for run in runs):.2f}"
            for what in ("wall", "cpu", "cluster")
        ]
        walls = [run["wall"] for run in runs]
        rows.append((contender.name, *row, f"{min(walls):.2f}-{max(walls):.2f}"))
    heading = f"No-op task: {jobs} jobs, {jobs} of {jobs} results each; medians in seconds"
    report.print_table(
        heading, ("", "wall", "CPU of the command", "CPU of the cluster", "wall, range"), rows
    )
    for contender in contenders:
        print(f"  {contender.name}: {contender.note}")


if __name__ == "__main__":
    sys.exit(main())
