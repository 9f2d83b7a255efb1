"""The benchmark's words: tables of figures, goals and the machine they were taken on."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peers as environments

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from goals import Goal
    from peers import Peers


def describe(peers: Peers) -> dict[str, Any]:
    """Where and when this was taken, with the versions of everything compared."""
    here = Path(__file__).resolve().parent
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "commit": _git(here, "rev-parse", "--short", "HEAD"),
        "uncommitted changes": bool(_git(here, "status", "--porcelain", "-uno", "..")),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "load before": " ".join(f"{number:.2f}" for number in os.getloadavg()),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions ours": environments.versions(None),
        **{f"versions {name}": environments.versions(peers, name) for name in peers.names},
    }


def source_digest() -> str:
    """A digest of the package that is measured, to see that it stayed the same."""
    import orchestrator

    digest = hashlib.sha256()
    for path in sorted(Path(orchestrator.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _git(folder: Path, *words: str) -> str:
    try:
        done = subprocess.run(
            ["git", *words], cwd=folder, capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return done.stdout.strip()


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def print_machine(facts: dict[str, Any]) -> None:
    for name, value in facts.items():
        shown = value
        if isinstance(value, dict):
            shown = ", ".join(f"{package} {number}" for package, number in value.items())
        print(f"{name + ':':21}{shown}")


def print_table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns as wide as they need; the first to the left, the others to the right."""
    table = [list(head), *map(list, rows)]
    widths = [max(len(row[place]) for row in table) for place in range(len(head))]
    print(f"\n{title}")
    for number, row in enumerate(table):
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join(cells).rstrip())
        if number == 0:
            print("  ".join("-" * width for width in widths))


def print_goals(goals: Sequence[Goal]) -> None:
    rows = [
        (
            goal.what,
            f"{goal.value:.3f}{goal.unit}",
            f"<= {goal.required:g}",
            "" if goal.aimed is None else f"<= {goal.aimed:g}",
            goal.verdict,
        )
        for goal in goals
    ]
    print_table("Goals", ("", "measured", "required", "aimed at", ""), rows)
