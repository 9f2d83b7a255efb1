"""Words that every message shares."""

from __future__ import annotations

import pytest

from orchestrator.wording import duration, plural


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (3.21, "3.2s"),
        (59.94, "59.9s"),
        (245, "4m05s"),
        (3723, "1h02m"),
        (273_600, "3d04h"),
    ],
)
def test_times_read_as_people_read_them(seconds, text):
    assert duration(seconds) == text


def test_one_is_not_many():
    assert [plural(count, "run") for count in (0, 1, 2)] == ["0 runs", "1 run", "2 runs"]
