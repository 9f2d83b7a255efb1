"""``orchestrator-export``: sweeps for clusters where no Python process may stay on the login node.

The other command, which fetches what they wrote, is in `orchestrator.cli.fetch`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from orchestrator.cli.fetch import fetch
from orchestrator.cli.output import plural, printable, reported_errors
from orchestrator.errors import OrchestratorError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from orchestrator.slurm.export.listed import ListedRun, Listing
    from orchestrator.slurm.export.script import Job, Written

_SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"]}
_RANGE = re.compile(r"(\d+)(?:-(\d+))?", re.ASCII)


@click.group(context_settings=_SETTINGS)
def main() -> None:
    """Take a sweep to a cluster by sbatch and rsync alone.

    \b
    Examples:
      orchestrator-export slurm outputs --missing
      orchestrator-export slurm -- python -m orchestrator -m 'seed=range(6)'
      orchestrator-export rsync cluster:project/outputs
    """  # noqa: D301 - click reads the backspace


class _TakesCommand(click.Command):
    """What follows ``--`` is a command, whatever it looks like."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if "--" in args:
            end = args.index("--")
            ctx.meta["command"] = args[end + 1 :]
            args = args[:end]
        return super().parse_args(ctx, args)


@main.command(cls=_TakesCommand, context_settings=_SETTINGS, options_metavar="[OPTIONS]")
@click.argument("directory", required=False, type=click.Path(), metavar="[DIR | -- COMMAND]")
@click.option("--sweep", "sweep_id", metavar="ID", help="Which of DIR's sweeps. Default: the last.")
@click.option(
    "--indices",
    metavar="LIST",
    help="Only these runs, by their numbers in the sweep: 0-5,7.",
)
@click.option("--missing", is_flag=True, help="Only runs that are not COMPLETED.")
@click.option(
    "--output",
    metavar="FILE",
    default="sweep.sbatch",
    show_default=True,
    type=click.Path(),
    help="The script. Its run list and logs/ go beside it.",
)
@click.option(
    "--cluster-file",
    metavar="FILE",
    type=click.Path(),
    help="A JSON file of cluster settings (docs/clusters.md).",
)
@click.option(
    "--option",
    "options",
    metavar="NAME=VALUE",
    multiple=True,
    help="An option of sbatch, e.g. time=2:00:00 or exclusive; may be given more than once.",
)
@click.option("--pre", metavar="LINE", multiple=True, help="A line of shell before the run.")
@click.option("--post", metavar="LINE", multiple=True, help="A line of shell after the run.")
@click.option(
    "--python",
    metavar="COMMAND",
    help="What starts Python there, e.g. python where a --pre line activates an environment. "
    "Default: the interpreter of the sweep's command.",
)
@click.option("--parallel", type=click.IntRange(min=1), help="Tasks at a time. Default: no limit.")
@click.option(
    "--runs-per-task",
    type=click.IntRange(min=1),
    help="Runs that share a task through the local queue. Default: 1, or as the cluster file says.",
)
@click.option(
    "--array-size",
    type=click.IntRange(min=1),
    help="The cluster's MaxArraySize. Default: as scontrol says, else 1001.",
)
@click.pass_context
def slurm(ctx: click.Context, /, directory: str | None, output: str, **given: Any) -> None:
    """Write an sbatch array script over the runs of a sweep.

    DIR (default: outputs) holds a sweep that was started, here or anywhere with the same
    directories. A COMMAND after -- is one that was not: its runs are listed, none begins.

    Each task of the array is one run, by its own command line, in the directory where the sweep
    was typed, and leaves the same directory, record and logs as the local queue. What is
    COMPLETED is not done again, so the script may be submitted again. The pre and post lines and
    options of hydra/launcher=slurm in the command are taken over, those of --cluster-file win
    over them, and --option wins over both.

    \b
    Examples:
      orchestrator-export slurm --option time=2:00:00 --option gpus-per-node=1
      orchestrator-export slurm outputs --missing --parallel 20
      orchestrator-export slurm --cluster-file cedar.json --pre 'module load cuda' -- \\
          python -m orchestrator -m training.epochs=10,50 'seed=range(6)'
    """  # noqa: D301 - click reads the backspace
    command = ctx.meta.get("command")
    with reported_errors():
        if command is not None and directory is not None:
            raise OrchestratorError(
                f"{directory!r} and a command were given; expected the directory of a sweep that "
                "was started, or the command of one that was not"
            )
        from orchestrator.slurm.export.script import Job, check_path

        # What is wrong with the options themselves is said before the app is asked.
        check_path(Path(output))
        _add_options(Job(), given)
        wanted = _parse_indices(given["indices"])
        listing, draft = _list(directory or "outputs", given["sweep_id"], command)
        runs = _choose(listing, wanted, missing=given["missing"])
        if not runs:
            click.echo(f"all {plural(len(listing.runs), 'run')} are COMPLETED: nothing to submit")
            return
        written = _write(listing, runs, Path(output), given)
        _enter(listing, draft)
        _tell(written, output, listing, runs)


def _list(
    directory: str, sweep_id: str | None, command: Sequence[str] | None
) -> tuple[Listing, bytes]:
    from orchestrator.slurm.export import listed

    if command is None:
        root = Path(directory)
        return listed.list_past(listed.choose_sweep(root, sweep_id), root), b""
    if not command:
        raise OrchestratorError("there is no command after --, e.g. -- python app.py -m lr=1,2")
    if sweep_id is not None:
        raise OrchestratorError("--sweep is for a sweep that was started; leave it, or the command")
    return listed.list_new(command)


def _choose(listing: Listing, wanted: set[int] | None, *, missing: bool) -> list[ListedRun]:
    total = len(listing.runs)
    if wanted and max(wanted) >= total:
        raise OrchestratorError(
            f"--indices has {max(wanted)}, and the sweep has {plural(total, 'run')}, numbered from 0"
        )
    runs = [run for run in listing.runs if wanted is None or run.index in wanted]
    return [run for run in runs if not (missing and run.is_done)]


def _parse_indices(text: str | None) -> set[int] | None:
    if text is None:
        return None
    found: set[int] = set()
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise OrchestratorError(f"--indices has {part!r}; expected numbers such as 0-5,7")
        found.update(range(first, last + 1))
    return found


def _write(
    listing: Listing, runs: Sequence[ListedRun], output: Path, given: dict[str, Any]
) -> Written:
    from orchestrator.slurm.export.script import write_script

    job = _job(listing, given)
    limits = _limits()
    return write_script(
        output,
        job,
        listing,
        runs,
        array_size=given["array_size"] or limits.max_array_size,
        kill_wait_s=limits.kill_wait_s,
    )


def _job(listing: Listing, given: dict[str, Any]) -> Job:
    """What the sweep's command, the cluster file and the options ask for; the last one wins."""
    from orchestrator.slurm.cluster_file import read_cluster_file
    from orchestrator.slurm.export.script import Job

    job = Job()
    job.option("job-name", listing.job_name)
    _refuse_varying(listing)
    if file := listing.launcher.get("cluster_file"):
        job.take(read_cluster_file(Path(listing.cwd, file)))
    job.take(listing.launcher)
    _add_options(job, given)
    return job


def _add_options(job: Job, given: dict[str, Any]) -> None:
    from orchestrator.slurm.cluster_file import read_cluster_file

    if given["cluster_file"] is not None:
        job.take(read_cluster_file(Path(given["cluster_file"])))
    for text in given["options"]:
        name, equals, value = text.partition("=")
        job.option(name, value if equals else None)
    job.pre += given["pre"]
    job.post += given["post"]
    job.python = given["python"] or job.python
    job.parallel = given["parallel"] or job.parallel
    job.runs_per_task = given["runs_per_task"] or job.runs_per_task


def _refuse_varying(listing: Listing) -> None:
    if listing.varying:
        names = ", ".join(f"hydra.launcher.{key}" for key in listing.varying)
        raise OrchestratorError(
            f"{names} differs from run to run, and the tasks of an array are all alike. Give the "
            "command one value for all runs, or export them in parts, by --indices"
        )


def _limits() -> Any:
    from orchestrator.slurm.client import Limits, SlurmClient, SlurmUnreachable

    client = SlurmClient()
    try:
        return client.limits() if client.is_there() else Limits()
    except SlurmUnreachable:
        return Limits()


def _enter(listing: Listing, draft: bytes) -> None:
    """Make a sweep that was never started one of its outputs directory."""
    if draft:
        from orchestrator.slurm.export.listed import SWEEP_FILE
        from orchestrator.store import SWEEPS, write_atomic

        write_atomic(Path(listing.root, SWEEPS, listing.sweep_id, SWEEP_FILE), draft)


def _tell(written: Written, output: str, listing: Listing, runs: Sequence[ListedRun]) -> None:
    from collections import Counter

    states = Counter("not begun" if run.state is None else run.state.value for run in runs)
    said = ", ".join(f"{count} {state}" for state, count in states.most_common())
    total = plural(len(listing.runs), "run")
    of = total if len(runs) == len(listing.runs) else f"{len(runs)} of {total}"
    calls = written.calls(output if not output.startswith("-") else f"./{output}")
    lines = [
        f"{of} of sweep {listing.sweep_id}: {said}",
        f"  runs  {written.run_list}",
        f"  logs  {written.logs}",
        *calls,
    ]
    for line in lines:
        click.echo(printable(line, None))


main.add_command(fetch)

if __name__ == "__main__":
    main()
