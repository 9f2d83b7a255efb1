"""``orchestrator-aggregate``: merge the records of many runs into tables."""

from __future__ import annotations

import math
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from orchestrator.cli.output import plural, print_table, printable, reported_errors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from orchestrator.record import RunRecord
    from orchestrator.results.reading import FoundRun, Reading
    from orchestrator.results.settings_table import Comparison, Row
    from orchestrator.results.statistics import Mode

_FORMATS = ("csv", "parquet", "json")
_LISTED = 20
_NAMED_RUNS = 8


def _parse_formats(
    _context: click.Context, _parameter: click.Parameter, value: str
) -> tuple[str, ...]:
    words = tuple(dict.fromkeys(word.strip().lower() for word in value.split(",")))
    unknown = [word for word in words if word not in _FORMATS]
    if unknown:
        msg = f"{unknown[0]!r} is not a format; choose from {', '.join(_FORMATS)}, joined by commas"
        raise click.BadParameter(msg)
    return words


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("directories", nargs=-1, metavar="[DIRS]...", type=click.Path())
@click.option(
    "--output",
    metavar="DIR",
    type=click.Path(),
    help="Where to write. Default: DIRS if it is one directory, else the current directory; "
    "nothing is written into a run's own directory.",
)
@click.option(
    "--format",
    "formats",
    default=",".join(_FORMATS),
    show_default=True,
    callback=_parse_formats,
    help="Which files to write, joined by commas.",
)
@click.option(
    "--metric",
    metavar="NAME",
    help="What settings are compared by: a metric, return_value, return.KEY, "
    "duration_seconds or peak_gpu_memory_gb. Default: what most completed runs have; of "
    "several return_value, else the first by name.",
)
@click.option(
    "--mode",
    type=click.Choice(["max", "min"]),
    help="Whether the highest or the lowest is best. Default: min if the metric's name has a "
    "word such as loss or error, else max.",
)
@click.option(
    "--seed-key", default="seed", show_default=True, help="The hyperparameter to pool over."
)
@click.option(
    "--top",
    default=50,
    show_default=True,
    type=click.IntRange(min=0),
    help="How many settings to print, best first; 0 for all.",
)
@click.option("--quiet", "-q", is_flag=True, help="Write the files and print only problems.")
def main(
    *,
    directories: tuple[str, ...],
    output: str | None,
    formats: tuple[str, ...],
    metric: str | None,
    mode: Mode | None,
    seed_key: str,
    top: int,
    quiet: bool,
) -> None:
    """Merge the runs in DIRS (default: outputs), at any depth, into one table.

    Writes results.csv, results.parquet and results.json (one row per run), and prints
    one row per setting: seeds are pooled into mean, standard error and n over the
    COMPLETED runs. Failed and unfinished (cancelled, too) runs are counted and listed.
    What a run was not given is taken from its saved config; a `-` stands for a key that
    the config has not, and for the error of a single run. Runs of one setting whose
    configs differ are told apart by what differs.
    NaN is never the best; one NaN makes its setting's mean NaN.

    \b
    Examples:
      orchestrator-aggregate
      orchestrator-aggregate outputs --metric test_loss --mode min --top 10
      orchestrator-aggregate outputs/a outputs/b --output merged --format csv
    """  # noqa: D301 - click reads the backspace
    with reported_errors():
        from orchestrator.results import scores
        from orchestrator.results.reading import read_runs, require_any
        from orchestrator.results.settings_table import compare
        from orchestrator.results.telling import told_apart

        roots = directories or ("outputs",)
        reading = read_runs(roots)
        require_any(reading, roots)
        _report_skipped(reading)
        if _was_given("seed_key"):
            scores.check_seed_key(reading.runs, seed_key)
        counts = scores.score_counts(reading.runs)
        chosen = scores.choose_score(counts, metric)
        runs, notes = told_apart(reading.runs, seed_key)
        for note in notes:
            click.echo(printable(f"note: {note}", None), err=True)
        written = _write(runs, roots, output, formats)
        if not quiet:
            _print_summary(runs)
            comparison = compare(runs, chosen, mode, seed_key)
            _print_comparison(comparison, list(counts), top)
            _print_unsuccessful(runs)
            _print_best(comparison)
            _print_written(written)


def _was_given(parameter: str) -> bool:
    source = click.get_current_context().get_parameter_source(parameter)
    return source is click.core.ParameterSource.COMMANDLINE


def _report_skipped(reading: Reading) -> None:
    for skipped in reading.unreadable:
        click.echo(printable(f"skipped {skipped.path}: {skipped.reason}", None), err=True)
    if reading.unreadable:
        total = len(reading.runs) + len(reading.unreadable)
        click.echo(
            f"{len(reading.unreadable)} of {total} records could not be read: not in the results",
            err=True,
        )
    fingerprints = [run.record.fingerprint for run in reading.runs if run.record.fingerprint]
    repeated = len(fingerprints) - len(set(fingerprints))
    if repeated:
        click.echo(
            f"note: {plural(repeated, 'run')} with another's exact config (the same "
            "fingerprint), as copies of a directory are; each is counted",
            err=True,
        )


def _write(
    runs: Sequence[FoundRun], roots: Sequence[str], output: str | None, formats: Sequence[str]
) -> list[Path]:
    from orchestrator.results.export import write_results
    from orchestrator.store import RECORD

    target = Path(output or (roots[0] if len(roots) == 1 else "."))
    if output is None and (target / RECORD).exists():
        return []
    return write_results(runs, target, formats)


def _print_written(written: Sequence[Path]) -> None:
    paths = ", ".join(printable(str(path), None) for path in written)
    click.echo(
        f"wrote {paths}"
        if paths
        else "nothing written: this is a run's own directory; say where to with --output DIR"
    )


def _print_summary(runs: Sequence[FoundRun]) -> None:
    from collections import Counter

    counts = Counter(run.state.value for run in runs)
    states = ", ".join(f"{count} {state}" for state, count in counts.most_common())
    click.echo(f"{plural(len(runs), 'run')}: {states}")


def _print_comparison(comparison: Comparison, names: Sequence[str], top: int) -> None:
    if comparison.same:
        text = " ".join(f"{key}={printable(value)}" for key, value in comparison.same.items())
        click.echo(f"the same in all: {printable(text, None)}")
    metric = comparison.metric
    if metric is not None:
        others = [name for name in names if name != metric]
        also = f"; there are also {', '.join(others)}" if others else ""
        click.echo(printable(f"compared by {metric} ({comparison.mode}){also}", None))
    without = sum(row.without for row in comparison.rows)
    if without and metric is not None:
        text = f"{without} completed without {metric}: see the last column"
        click.echo(printable(text, None))
    click.echo()
    shown = comparison.rows[:top] if top else comparison.rows
    _print_rows(shown, comparison.keys, metric or "mean")
    hidden = len(comparison.rows) - len(shown)
    if hidden:
        click.echo(f"... and {plural(hidden, 'more setting')} (--top 0 for all)")
    click.echo()


def _print_rows(rows: Sequence[Row], keys: Sequence[str], metric: str) -> None:
    from orchestrator.results.settings_table import shown

    numbers = [metric, "std err", "n", "failed", "unfinished"]
    some_without = any(row.without for row in rows)
    if some_without:
        numbers.append("without")
    headers = [*(keys or ["setting"]), *numbers]
    cells = [
        [
            *([shown(row.setting, key) for key in keys] if keys else ["all runs"]),
            "-" if row.n == 0 else f"{row.mean:.6g}",
            "-" if row.n <= 1 else f"{row.standard_error:.2g}",
            str(row.n),
            str(row.setting.failed),
            str(row.setting.unfinished),
            *([str(row.without)] if some_without else []),
        ]
        for row in rows
    ]
    print_table(headers, cells, right=range(len(headers) - len(numbers), len(headers)))


def _print_best(comparison: Comparison) -> None:
    from orchestrator.results.settings_table import shown

    row, metric = comparison.best, comparison.metric
    if metric is None:
        click.echo("no run has logged or returned a number yet, so there is no best setting")
        return
    if row is None:
        click.echo(printable(f"no best setting: no completed run has a number as {metric}", None))
        return
    given = [key for key in comparison.keys if key in row.setting.hyperparams]
    setting = " ".join(f"{key}={shown(row.setting, key)}" for key in given) or (
        "the config's own values" if comparison.keys else "all runs"
    )
    error = "" if math.isnan(row.standard_error) else f" ± {row.standard_error:.2g}"
    way = "highest" if comparison.mode == "max" else "lowest"
    text = f"best ({way} mean {metric}): {setting}: {row.mean:.6g}{error} (n={row.n})"
    click.echo(printable(text, None))
    names = " ".join(run.directory for run, _ in row.scored[:_NAMED_RUNS])
    more = f" and {row.n - _NAMED_RUNS} more" if row.n > _NAMED_RUNS else ""
    click.echo(printable(f"  runs: {names}{more}", None))
    again = _again(row.best_run(comparison.mode).record)
    if again:
        click.echo(printable(f"  its best run again: {again}", None))


def _again(record: RunRecord) -> str:
    """The shell line that runs a run again from here."""
    here = not record.cwd or os.path.realpath(record.cwd) == os.path.realpath(".")
    if here or not record.command:
        return record.command
    return f"cd {shlex.quote(record.cwd)} && {record.command}"


def _print_unsuccessful(runs: Sequence[FoundRun]) -> None:
    from orchestrator.record import RunState
    from orchestrator.results.status import ORDER, error_line

    rest = [run for run in runs if run.state is not RunState.COMPLETED]
    if not rest:
        return
    rest.sort(key=lambda run: ORDER.index(run.state.value))
    click.echo("failed and unfinished:\n")
    rows = [[run.directory, run.state.value, error_line(run) or ""] for run in rest[:_LISTED]]
    print_table(["run", "state", "error"], rows, wide={2})
    if len(rest) > _LISTED:
        click.echo(f"... and {len(rest) - _LISTED} more (orchestrator-status lists all)")
    click.echo()


if __name__ == "__main__":
    main()
