"""How busy eight GPUs are kept: this queue, and the ways in which scripts hand out jobs.

    python benchmarks/gpus.py                 # simulated: real places and lease tables, own clock
    python benchmarks/gpus.py --real          # also real processes, on stubbed GPUs (a minute)

All contenders get the same durations in the same order. The measure is the makespan over that of
list scheduling (each job to the GPU that is free first, at no cost), the best that a queue without
foresight can do. Batch-wait starts one job on each GPU and waits for all of them; round-robin gives
job i to GPU i mod 8 beforehand.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from simulation import G, Job, Launcher, Machine, list_schedule

from orchestrator.queue.needs import Need

GPUS = 8
ROOT = Path(__file__).resolve().parents[1]


def durations(seed, number, median):
    """Seconds, as trainings take: most near the median, some ten times that."""
    chance = random.Random(seed)
    return [
        round(min(median * chance.lognormvariate(0, 0.8), 10 * median), 3) for _ in range(number)
    ]


def batch_wait(seconds):
    return sum(max(seconds[i : i + GPUS]) for i in range(0, len(seconds), GPUS))


def round_robin(seconds):
    return max(sum(seconds[n::GPUS]) for n in range(GPUS))


def simulated(seconds, launchers, directory):
    """The makespan of this queue, the jobs dealt out to so many sweeps that run at once."""
    machine = Machine()
    sweeps = [
        Launcher(
            machine,
            directory / f"leases-{launchers}",
            [Job(s, 10 * G, appears=1.0, lingers=0.05, need=Need()) for s in seconds[n::launchers]],
            lookahead=1,
        )
        for n in range(launchers)
    ]
    machine.run()
    done = sorted((job for sweep in sweeps for job in sweep.done), key=lambda job: job.started)
    assert len(done) == len(seconds), f"{len(done)} of {len(seconds)} jobs ended"
    for sweep in sweeps:
        sweep.close()
    return max(job.ended for job in done), [job.seconds for job in done]


def real(seconds, directory):
    """The makespan of this queue with processes that sleep, by what their records say."""
    sys.path.insert(0, str(ROOT / "tests" / "nvml"))
    import stub

    library = stub.build(directory / "lib")
    if library is None:
        sys.exit("--real needs a C compiler for the stubbed NVML, and there is none.")
    nvml = stub.NvmlStub(library, directory / "nvml")
    nvml.gpus([f"GPU-{n}" for n in range(GPUS)])
    state = directory / "state"
    state.mkdir()
    words = ["hydra/launcher=gpu_queue", "hydra/sweeper=grid", "hydra/callbacks=results"]
    words += ["hydra/output=named", f"hydra.launcher.lease_dir={directory}/leases"]
    subprocess.run(
        [
            *(sys.executable, str(ROOT / "tests/queue/apps/gpu_app.py"), "-m", *words),
            "seconds=" + ",".join(map(str, seconds)),
        ],
        cwd=directory,
        env={**os.environ, **nvml.env, "SWEEP_STATE": str(state)},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    records = [json.loads(p.read_bytes()) for p in (directory / "outputs").glob("*/run.json")]
    assert sum(r["state"] == "COMPLETED" for r in records) == len(seconds)
    records.sort(key=lambda record: record["started_at"])
    makespan = max(r["ended_at"] for r in records) - records[0]["started_at"]
    return makespan, [float(record["hyperparams"]["seconds"]) for record in records]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2_000)
    parser.add_argument("--median", type=float, default=12.0, help="seconds of a simulated job")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--real", action="store_true")
    parser.add_argument("--real-jobs", type=int, default=160)
    options = parser.parse_args()
    rows = {}

    def note(name, makespan, bound):
        rows.setdefault(name, []).append(makespan / bound)

    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            seconds = durations(number, options.jobs, options.median)
            bound = list_schedule(seconds)
            directory = Path(folder) / str(number)
            directory.mkdir()
            for launchers in (1, 3):
                makespan, order = simulated(seconds, launchers, directory)
                note(f"gpu_queue, {launchers} at once (simulated)", makespan, list_schedule(order))
            note("round-robin (computed)", round_robin(seconds), bound)
            note("batch-wait (computed)", batch_wait(seconds), bound)
            if options.real:
                sleeps = durations(number, options.real_jobs, 1.5)
                makespan, order = real(sorted(set(sleeps)), directory)
                note("gpu_queue, real processes", makespan, list_schedule(order))
    print(
        f"makespan / list scheduling on {GPUS} GPUs, {options.jobs} jobs, {options.rounds} rounds"
    )
    for name, ratios in rows.items():
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        print(f"  {name:36} {statistics.median(ratios):.3f}   ({spread})")


if __name__ == "__main__":
    main()
