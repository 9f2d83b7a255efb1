"""What a launched job costs: ours beside Hydra basic, joblib, submitit_local and xargs.

    python benchmarks/launch.py [--jobs 64] [--repeats 3] [--torch] [--scale]
                                [--torch-jobs 64] [--peers DIR] [--keep DIR] [--json FILE]

**What is run.** One plain Hydra app (`benchmarks/apps/noop.py`: 30 keys in 4 groups) whose
task only writes a file `done`, swept over `seed` on 2 slots. Each contender runs the whole
sweep as one command: our launcher with `start_method=fork` and `spawn`, Hydra's basic
launcher, joblib with `n_jobs=2`, submitit_local (which knows no limit and starts all at
once), and `xargs -P2 python app.py seed=K`. After each sweep every job's directory must
hold its own `config.yaml`, `overrides.yaml` and `done` file: N of N, or the benchmark ends.

**Who runs where.** Ours in the interpreter that runs this script. Each peer in a virtual
environment of its own, with the same versions of Python, Hydra and OmegaConf and without
our package, so that none pays for another's plugins. They are made once, below `--peers`,
and used again. Everything runs in one directory, on the same paths.

**What is measured.** See `benchmarks/meter.py`: CPU of the whole process tree, processes
that detach included, and wall time of the command. Contenders alternate (A B C A B C) over
the repeats, after one unmeasured round that fills the caches; medians are reported. Figures
per job are those of the whole command divided by the jobs, nothing subtracted; a sweep of
one job (`start-up`) and the cost of each further job (`marginal`) stand beside them.

**What is compared.** The `.hydra/` files of ours, fork and spawn, must be byte-identical to
Hydra's own; `benchmarks/hydra_files.py` says what is left out. `--torch` adds an app that
imports torch and uses it in the task; with few jobs (`--torch-jobs`) the launcher's own
import of torch, which nobody can avoid, is most of the figure. `--scale` adds the time to
the first job of a sweep of 8 and of 5,000, beside Hydra's basic sweeper, and the growth of
the launcher's memory.

The exit code is 1 if a required figure is missed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import goals
import hydra_files
import meter
import peers as environments
import report
import scale
from contenders import SLOTS, Arena, make_contenders

if TYPE_CHECKING:
    from collections.abc import Sequence

    from contenders import Contender
    from goals import Goal
    from meter import Usage
    from peers import Peers

TORCH_CONTENDERS = ("fork", "spawn", "basic", "joblib", "submitit_local")


def main() -> int:
    options = parse()
    if options.torch and not environments.have_torch():
        sys.exit("--torch: torch is not installed for this interpreter.")
    meter.become_subreaper()
    peers = environments.make(options.peers, torch=options.torch)
    facts = report.describe(peers)
    measured = report.source_digest()
    report.print_machine(facts)
    print(f"\n{meter.METHOD}")
    folder = nullcontext(options.keep) if options.keep else tempfile.TemporaryDirectory()
    with folder as root:
        sections, judged = run_all(options, peers, Path(root).absolute())
    report.print_goals(judged)
    facts["source changed meanwhile"] = report.source_digest() != measured
    if facts["source changed meanwhile"]:
        print("\nThe measured package was edited while this ran: take the figures again.")
    if options.json:
        content = {
            "machine": facts,
            "method": meter.METHOD,
            **sections,
            "goals": [{**asdict(goal), "verdict": goal.verdict} for goal in judged],
        }
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0 if all(goal.passed for goal in judged) else 1


def parse() -> argparse.Namespace:
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=64, help="jobs of the no-op sweep")
    parser.add_argument("--repeats", type=int, default=3, help="measured rounds")
    parser.add_argument("--torch", action="store_true", help="also with torch in the task")
    parser.add_argument(
        "--torch-jobs", type=int, default=64, help="its jobs; submitit_local starts all at once"
    )
    parser.add_argument("--scale", action="store_true", help="also first job and memory")
    parser.add_argument("--peers", type=Path, default=here / ".peers", help="their environments")
    parser.add_argument("--keep", type=Path, help="keep apps and last outputs in this folder")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    if min(options.jobs, options.torch_jobs) < 2 or options.repeats < 1:
        parser.error("at least 2 jobs and 1 repeat")
    return options


def run_all(
    options: argparse.Namespace, peers: Peers, root: Path
) -> tuple[dict[str, Any], list[Goal]]:
    """Every part that was asked for: its figures by name, and what they are judged by."""
    field = make_contenders(peers)
    arena = make_arena(root / "noop", "noop.py")
    figures = compare(field, arena, options.jobs, options.repeats)
    show("No-op task", field, figures, options.jobs)
    sections: dict[str, Any] = {"noop": figures}
    judged = [limit.goal(figures["per_job"]) for limit in goals.NOOP_LIMITS]
    judged += identity(arena, options.jobs)
    if options.torch:
        arena = make_arena(root / "torch", "uses_torch.py", peers.torch)
        field = [each for each in field if each.name in TORCH_CONTENDERS]
        sections["torch"] = figures = compare(field, arena, options.torch_jobs, options.repeats)
        show("torch imported and used in the task", field, figures, options.torch_jobs)
        judged += [limit.goal(figures["per_job"], ", torch") for limit in goals.TORCH_LIMITS]
    if options.scale:
        arena = make_arena(root / "scale", "noop.py")
        sections["scale"], more = run_scale(arena, peers, options.repeats)
        judged += more
    return sections, judged


def make_arena(root: Path, app: str, torch: Path | None = None) -> Arena:
    root.mkdir(parents=True, exist_ok=True)
    return Arena(root, app, torch)


def compare(field: Sequence[Contender], arena: Arena, jobs: int, repeats: int) -> dict[str, Any]:
    """Run everybody, in turns; the last outputs of each stay in the arena."""
    for contender in field:
        say(f"warming up {contender.name}")
        arena.run(contender, 1)
    start_up: dict[str, list[Usage]] = {contender.name: [] for contender in field}
    whole: dict[str, list[Usage]] = {contender.name: [] for contender in field}
    for number in range(repeats):
        for contender in field:
            say(f"round {number + 1} of {repeats}: {contender.name}")
            start_up[contender.name].append(arena.run(contender, 1))
            whole[contender.name].append(arena.run(contender, jobs))
    return {
        "jobs": jobs,
        "slots": SLOTS,
        "repeats": repeats,
        "per_job": {name: per_job(runs, start_up[name], jobs) for name, runs in whole.items()},
        "start_up": {name: [asdict(run) for run in runs] for name, runs in start_up.items()},
        "whole": {name: [asdict(run) for run in runs] for name, runs in whole.items()},
    }


def per_job(whole: Sequence[Usage], start_up: Sequence[Usage], jobs: int) -> dict[str, float]:
    """Medians in seconds: per job of the whole command, of one job alone, of one job more."""
    cpu, wall = (statistics.median(getattr(run, what) for run in whole) for what in ("cpu", "wall"))
    cpu_1, wall_1 = (
        statistics.median(getattr(run, what) for run in start_up) for what in ("cpu", "wall")
    )
    return {
        "cpu": cpu / jobs,
        "wall": wall / jobs,
        "cpu_low": min(run.cpu for run in whole) / jobs,
        "cpu_high": max(run.cpu for run in whole) / jobs,
        "start_up_cpu": cpu_1,
        "start_up_wall": wall_1,
        "marginal_cpu": (cpu - cpu_1) / (jobs - 1),
        "marginal_wall": (wall - wall_1) / (jobs - 1),
    }


_COLUMNS = {
    "cpu": "CPU/job",
    "cpu_low": "lowest",
    "cpu_high": "highest",
    "marginal_cpu": "marginal",
    "start_up_cpu": "start-up CPU",
    "wall": "wall/job",
    "marginal_wall": "marginal",
    "start_up_wall": "start-up wall",
}


def show(title: str, field: Sequence[Contender], figures: dict[str, Any], jobs: int) -> None:
    rows = [
        (name, *(f"{1000 * row[column]:.1f}" for column in _COLUMNS))
        for name, row in figures["per_job"].items()
    ]
    heading = f"{title}: {jobs} jobs, {SLOTS} slots, {jobs} of {jobs} results each; in ms"
    report.print_table(heading, ("", *_COLUMNS.values()), rows)
    for contender in field:
        print(f"  {contender.name}: {contender.note}")


def identity(arena: Arena, jobs: int) -> list[Goal]:
    """Compare ``.hydra/`` of the last sweeps of ours with those of Hydra's own launcher."""
    print(f"\n.hydra/ of {jobs} jobs beside Hydra's own ({hydra_files.NORMALISED}):")
    judged = []
    reference = arena.results_of("basic")
    for name in ("fork", "spawn"):
        found = hydra_files.differences(arena.results_of(name), reference, jobs)
        print(f"  {name}: {'identical' if not found else f'{len(found)} files differ'}")
        for line in found[:5]:
            print(f"    {line}")
        judged.append(goals.Goal(f".hydra files that differ: {name} / basic", len(found), 0))
    return judged


def run_scale(arena: Arena, peers: Peers, repeats: int) -> tuple[dict[str, Any], list[Goal]]:
    say("time to the first job")
    found = scale.first_jobs(arena, peers, repeats)
    rows = [
        (
            f"{name}, sweep of {jobs}",
            f"{1000 * each.after_s:.0f}",
            f"{1000 * each.launcher_cpu_s:.0f}",
        )
        for name, sizes in found.items()
        for jobs, each in sizes.items()
    ]
    heading = "From the command to the start of its first job, in ms"
    report.print_table(heading, ("", "wall", "launcher CPU"), rows)
    ours, basic = found["ours"], found["basic"]
    more = basic[scale.BASIC_LARGE].launcher_cpu_s - basic[scale.SMALL].launcher_cpu_s
    slope = more / (scale.BASIC_LARGE - scale.SMALL)
    print(f"  basic: {1000 * slope:.1f} s of CPU per 1,000 points before the first job starts")
    say("the launcher's memory")
    peak = scale.memory_growth(arena)
    growth = (peak[scale.MEMORY_LARGE] - peak[scale.MEMORY_SMALL]) / (
        scale.MEMORY_LARGE - scale.MEMORY_SMALL
    )
    for jobs, kilobytes in peak.items():
        print(f"  launcher's peak memory (VmHWM), sweep of {jobs}: {kilobytes:,} KB")
    delay = ours[scale.LARGE].after_s - ours[scale.SMALL].after_s
    what = f"first job of {scale.LARGE} later than of {scale.SMALL}"
    section = {
        "first_job": {n: {j: asdict(f) for j, f in sizes.items()} for n, sizes in found.items()},
        "basic_cpu_s_per_1000": 1000 * slope,
        "peak_kb": peak,
    }
    return section, [
        goals.Goal(what, delay, goals.FIRST_JOB_DELAY_S, unit=" s"),
        goals.Goal(
            "launcher's memory per finished job", growth, goals.KB_PER_FINISHED_JOB, unit=" KB"
        ),
    ]


def say(text: str) -> None:
    print(f"... {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
