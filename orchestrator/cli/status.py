"""``orchestrator-status``: where every run stands. Reads run directories, and asks Slurm.

It writes nothing but the final state of the dead. Its commands are in `orchestrator.cli.control`
(pause, drain, resume) and `orchestrator.cli.stop`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import click

from orchestrator.cli.output import duration, plural, print_table, printable, reported_errors

if TYPE_CHECKING:
    from orchestrator.results.status import RunStatus

# Written out, so that --help need not load the records.
_STATES = (
    "RUNNING",
    "LOST",
    "FAILED",
    "TIMEOUT",
    "UNREADABLE",
    "CANCELLED",
    "PENDING",
    "COMPLETED",
)


# Likewise: name, and what --help says of it.
_COMMANDS = {
    "pause": "Start no new run, on a GPU or at all.",
    "drain": "Let what runs end, and start nothing new.",
    "resume": "Take back what pause and drain said.",
    "stop": "End a sweep, here or on a cluster.",
}
_MODULES = {"stop": "orchestrator.cli.stop"}


class _Listing(click.Group):
    """The listing, unless the first word is a command's name."""

    # Unlike in other groups, options may follow the directory.
    allow_interspersed_args = True
    allow_extra_args = False

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(_MODULES.get(cmd_name, "orchestrator.cli.control"))
        command: click.Command = getattr(module, cmd_name)
        return command

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        name = args[0] if args else ""
        command = self.get_command(click.Context(self), name)
        if command is None:
            return super().make_context(info_name, args, parent, **extra)
        return command.make_context(f"{info_name} {name}", args[1:], parent, **extra)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return click.Command.parse_args(self, ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        if ctx.command is not self:
            return ctx.command.invoke(ctx)
        return click.Command.invoke(self, ctx)


@click.group(
    cls=_Listing,
    invoke_without_command=True,
    subcommand_metavar="",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.argument("directory", default="outputs", type=click.Path())
@click.option(
    "--state",
    "states",
    multiple=True,
    type=click.Choice(_STATES, case_sensitive=False),
    help="Only runs in this state; may be given more than once.",
)
@click.option("--name", metavar="GLOB", help="Only runs whose name or directory matches.")
@click.option("--json", "as_json", is_flag=True, help="Print strict JSON instead of a table.")
def main(directory: str, states: tuple[str, ...], name: str | None, as_json: bool) -> None:
    """List the runs in DIRECTORY (default: outputs), at any depth.

    Shows each run's state, device, process, time, last logged metrics and error, then
    how many are in each state. Running runs come first, then LOST (the process is gone
    and left no outcome), FAILED, TIMEOUT, UNREADABLE (a run.json that is not one of
    ours), CANCELLED, PENDING, and COMPLETED last.

    Slurm is asked about runs that were given to it: they are shown with their job and its
    node, or what it waits for, as in (Priority). Nothing is written but the final state of
    those whose job is gone and, once, what accounting says that they used.

    The commands below speak to a sweep that runs; where the first word is the name of one,
    it means the command (a directory of that name is ./pause).

    \b
    Examples:
      orchestrator-status
      orchestrator-status outputs/mlp --state failed --state lost
      orchestrator-status --name '*lr_0.1*'
      orchestrator-status --json | jq '.counts'
      orchestrator-status pause --help
    """  # noqa: D301 - click reads the backspace
    with reported_errors():
        _show(directory, states, name, as_json=as_json)


def _show(directory: str, states: tuple[str, ...], name: str | None, *, as_json: bool) -> None:
    import time

    from orchestrator.cli import slurm_runs
    from orchestrator.results import status
    from orchestrator.results.reading import read_runs, require_any

    reading = read_runs([directory])
    if not reading.unreadable:
        require_any(reading, [directory])
    asked = slurm_runs.ask(reading)
    everything = status.run_statuses(reading, time.time(), asked.placed)
    _print_all(status.select(everything, states, name), len(everything), as_json=as_json)
    for note in asked.notes:
        click.echo(printable(note, limit=None), err=True)
    slurm_runs.account(asked, reading, directory)


def _print_all(shown: list[RunStatus], total: int, *, as_json: bool) -> None:
    from orchestrator.results import status

    if as_json:
        click.echo(status.as_json(shown))
        return
    if shown:
        _print(shown)
    counts = ", ".join(f"{count} {state}" for state, count in status.counts(shown).items())
    if len(shown) == total:
        click.echo(f"{plural(len(shown), 'run')}: {counts}")
    else:
        click.echo(f"{len(shown)} of {plural(total, 'run')}: {counts or 'none match'}")


def _print(statuses: list[RunStatus]) -> None:
    headers = list(_cells(statuses[0]))
    if not any(status.slurm_job_id for status in statuses):
        headers.remove("job")
    if not any(status.error for status in statuses):
        headers.remove("error")
    cells = [_cells(status) for status in statuses]
    rows = [[row[header] for header in headers] for row in cells]
    right = {headers.index("pid"), headers.index("elapsed")}
    wide = {headers.index(name) for name in ("last metrics", "error") if name in headers}
    print_table(headers, rows, right, wide)
    click.echo()


def _cells(status: RunStatus) -> dict[str, str]:
    return {
        "run": status.name if status.directory == "." else status.directory,
        "state": status.state,
        "job": status.slurm_job_id or "-",
        "device": status.device,
        "pid": "-" if status.pid is None else str(status.pid),
        "elapsed": duration(status.elapsed_seconds),
        "last metrics": _metrics(status),
        "error": status.error or "",
    }


def _metrics(status: RunStatus) -> str:
    values = status.metrics or {}
    return " ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in values.items()
        if name != "timestamp"
    )


if __name__ == "__main__":
    main()
