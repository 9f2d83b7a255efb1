"""``orchestrator-status``: where every run stands. Reads run directories, writes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

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


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
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

    \b
    Examples:
      orchestrator-status
      orchestrator-status outputs/mlp --state failed --state lost
      orchestrator-status --name '*lr_0.1*'
      orchestrator-status --json | jq '.counts'
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
