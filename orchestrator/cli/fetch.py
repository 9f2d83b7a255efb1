"""``orchestrator-export rsync``: fetch a sweep's results, and leave behind what is large."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess

import click

from orchestrator.cli.output import reported_errors
from orchestrator.errors import OrchestratorError

# What --without checkpoints stands for.
_CHECKPOINTS = ("checkpoints/", "*.ckpt", "*.pt", "*.pth", "*.safetensors")
_SEEDS = re.compile(r"(-?\d+)(?:-(\d+))?", re.ASCII)
# From seed 001's line: compressed, links as files, newer files here stay, and what was cut off
# goes on. With times, so that what is here already is not sent again.
_FLAGS = "-zLurtP"


@click.command("rsync", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("source", metavar="HOST:PATH")
@click.argument("directory", default="outputs", type=click.Path())
@click.option(
    "--without",
    metavar="PATTERN",
    multiple=True,
    help="Leave behind files, or directories (NAME/), of this name; the word checkpoints means "
    f"{', '.join(_CHECKPOINTS)}. May be given more than once.",
)
@click.option(
    "--without-seeds",
    metavar="LIST",
    help="Leave behind the runs of these seeds: 3,4 or 10-19.",
)
@click.option(
    "--seed-label",
    metavar="LABEL",
    default="seed",
    show_default=True,
    help="How the seed reads in the runs' names.",
)
@click.option("--run", "runs", is_flag=True, help="Do it, instead of printing the line.")
def fetch(
    source: str,
    directory: str,
    without: tuple[str, ...],
    without_seeds: str | None,
    seed_label: str,
    *,
    runs: bool,
) -> None:
    """Print the rsync line that fetches the runs in HOST:PATH into DIRECTORY (default: outputs).

    The same line again fetches only what is new. orchestrator-aggregate works on what is there.

    \b
    Examples:
      orchestrator-export rsync cluster:project/outputs --without checkpoints
      orchestrator-export rsync cluster:project/outputs outputs --without-seeds 3,4 --run
    """  # noqa: D301 - click reads the backspace
    with reported_errors():
        patterns = [
            pattern
            for word in without
            for pattern in (_CHECKPOINTS if word == "checkpoints" else (word,))
        ]
        patterns += _of_seeds(without_seeds, seed_label)
        words = rsync_words(source, directory, patterns)
        if not runs:
            click.echo(shlex.join(words))
            return
        if shutil.which("rsync") is None:
            raise OrchestratorError(
                "rsync is not installed here; without --run the line is printed"
            )
        raise SystemExit(subprocess.run(words, check=False).returncode)


def rsync_words(source: str, directory: str, patterns: list[str]) -> list[str]:
    """The command line that fetches what is in ``source``, less what matches."""
    words = ["rsync", _FLAGS]
    path = source.partition(":")[2] if ":" in source else ""
    if shlex.quote(path) != path and path:
        words.append("--protect-args")  # else the shell over there reads the path, too
    words += [f"--exclude={pattern}" for pattern in patterns]
    return [*words, "--", f"{source.rstrip('/')}/", f"{directory.rstrip('/')}/"]


def _of_seeds(text: str | None, label: str) -> list[str]:
    """Patterns of run directories whose names have one of these seeds.

    Raises:
        OrchestratorError: it is no list of whole numbers.
    """
    patterns: list[str] = []
    for part in [] if text is None else text.split(","):
        match = _SEEDS.fullmatch(part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise OrchestratorError(
                f"--without-seeds has {part!r}; expected seeds such as 3,4 or 10-19"
            )
        for seed in range(first, last + 1):
            word = f"{label}_{seed}"
            # At the end of a name, before another part of it, before the digits of a fingerprint.
            ends = ("/", "_*/", "-*/")
            patterns += [f"{start}{word}{end}" for start in ("", "*_") for end in ends]
    return patterns
