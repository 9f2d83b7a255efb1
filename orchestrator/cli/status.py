"""``orchestrator-status``: where every run stands. Reads run directories, writes nothing.

Its commands (pause, drain, resume) are in `orchestrator.cli.control`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import click

from orchestrator.cli.output import duration, plural, print_table, reported_errors

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
}


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
        command: click.Command = getattr(
            importlib.import_module("orchestrator.cli.control"), cmd_name
        )
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
    ours), CANCELLED, PENDING, and COMPLETED last. Nothing is written.

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

    from orchestrator.results import status
    from orchestrator.results.reading import read_runs, require_any

    reading = read_runs([directory])
    if not reading.unreadable:
        require_any(reading, [directory])
    everything = status.run_statuses(reading, time.time())
    shown = status.select(everything, states, name)
    if as_json:
        click.echo(status.as_json(shown))
        return
    if shown:
        _print(shown)
    counts = ", ".join(f"{count} {state}" for state, count in status.counts(shown).items())
    if len(shown) == len(everything):
        click.echo(f"{plural(len(shown), 'run')}: {counts}")
    else:
        click.echo(f"{len(shown)} of {plural(len(everything), 'run')}: {counts or 'none match'}")


def _print(statuses: list[RunStatus]) -> None:
    headers = ["run", "state", "device", "pid", "elapsed", "last metrics", "error"]
    rows = [_cells(status) for status in statuses]
    if not any(status.error for status in statuses):
        headers, rows = headers[:-1], [row[:-1] for row in rows]
    print_table(headers, rows, right={3, 4}, wide={5, 6})
    click.echo()


def _cells(status: RunStatus) -> list[str]:
    return [
        status.name if status.directory == "." else status.directory,
        status.state,
        status.device,
        "-" if status.pid is None else str(status.pid),
        duration(status.elapsed_seconds),
        _metrics(status),
        status.error or "",
    ]


def _metrics(status: RunStatus) -> str:
    values = status.metrics or {}
    return " ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in values.items()
        if name != "timestamp"
    )


if __name__ == "__main__":
    main()
