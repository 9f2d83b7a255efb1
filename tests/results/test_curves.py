"""The last step of a curve, read from the end."""

from __future__ import annotations

import pytest

from orchestrator.results.curves import last_step


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", None),
        (b'{"step": 1}', None),
        (b'{"step": 1}\n', {"step": 1}),
        (b'{"step": 1}\n{"step": 2}\n', {"step": 2}),
        (b'{"step": 1}\n{"step": 2', {"step": 1}),
        (b'{"step": 1}\n{"step": 2\n', {"step": 1}),
        (b'{"step": 1}\n\n\n', {"step": 1}),
        (b'{"step": 1}\n[2]\n\xff\xfe\n', {"step": 1}),
        (b'{"step": 1}\n{"loss": NaN}\n', {"step": 1}),
        (b'{"loss": "NaN"}\n', {"loss": "NaN"}),
        (b'{"step": 1}\n' + b"[" * 200_000 + b"\n", {"step": 1}),
        (b"\x00" * 3_000_000, None),
        (b"garbage\n" * 500_000, None),
    ],
)
def test_the_last_complete_line_counts(tmp_path, content, expected):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    assert last_step(path) == expected


@pytest.mark.parametrize("length", [8_180, 8_192, 8_193, 20_000, 300_000])
def test_lines_longer_than_a_block_are_read_whole(tmp_path, length):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"note": "' + b"x" * length + b'"}\n')
    assert last_step(path) == {"note": "x" * length}


def test_no_file_and_a_directory_have_no_last_step(tmp_path):
    assert last_step(tmp_path / "none") is None
    assert last_step(tmp_path) is None
