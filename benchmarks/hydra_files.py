"""Whether two sweeps' ``.hydra/`` folders are the same, byte by byte.

All contenders run in the same directory, so paths need no change. Left out of the
comparison is only what says which launcher and sweeper were asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# Nodes of hydra.yaml, as paths of its keys.
LEFT_OUT = (
    ("hydra", "launcher"),
    ("hydra", "sweeper"),
    ("hydra", "overrides", "hydra"),
    ("hydra", "runtime", "choices", "hydra/launcher"),
    ("hydra", "runtime", "choices", "hydra/sweeper"),
)
NORMALISED = (
    "all run in one directory; left out of hydra.yaml: "
    + ", ".join(".".join(keys) for keys in LEFT_OUT)
    + "; nothing else is changed"
)
_FILES = ("config.yaml", "overrides.yaml", "hydra.yaml")


def differences(ours: Path, theirs: Path, jobs: int) -> list[str]:
    """What differs, one line per file; none if all files of all jobs are identical."""
    found = []
    for number in range(jobs):
        for name in _FILES:
            inner = f"{number}/.hydra/{name}"
            mine, reference = (_content(root / inner) for root in (ours, theirs))
            if mine != reference:
                found.append(f"{inner}: {_first_difference(mine, reference)}")
        extra = {p.name for p in (ours / str(number) / ".hydra").iterdir()} - set(_FILES)
        found += [f"{number}/.hydra/{name}: only in ours" for name in sorted(extra)]
    return found


def _content(path: Path) -> str:
    text = path.read_bytes().decode()
    return "".join(_without(text, LEFT_OUT)) if path.name == "hydra.yaml" else text


def _without(text: str, nodes: tuple[tuple[str, ...], ...]) -> Iterator[str]:
    """The lines of a block-style YAML text, less some nodes; every other byte is kept."""
    above: list[tuple[float, str]] = []
    for line in text.splitlines(keepends=True):
        body = line.lstrip(" ")
        # Blank lines stand in texts of many lines, whatever their depth.
        if body.strip():
            dash = body.startswith("- ")
            # The dashes of a list stand as deep as the key that it belongs to.
            depth = len(line) - len(body) + (0.5 if dash else 0)
            while above and above[-1][0] >= depth:
                above.pop()
            above.append((depth, "-" if dash else body.partition(":")[0]))
        keys = tuple(key for _, key in above)
        if not any(keys[: len(node)] == node for node in nodes):
            yield line


def _first_difference(mine: str, reference: str) -> str:
    pairs = zip(mine.splitlines(), reference.splitlines(), strict=False)
    different = (f"ours {a!r}, Hydra's {b!r}" for a, b in pairs if a != b)
    return next(different, f"ours has {len(mine)} characters, Hydra's {len(reference)}")
