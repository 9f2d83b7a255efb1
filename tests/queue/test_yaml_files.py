"""The files in .hydra/ are byte for byte what OmegaConf writes."""

from __future__ import annotations

from enum import Enum

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from orchestrator.queue.yaml_files import to_yaml

ascii_text = st.text(st.characters(min_codepoint=9, max_codepoint=126), max_size=150)
tricky_text = st.text(" ab\n'\":#-?,[]{}&*!|>%@`~0.e1", max_size=120)
long_text = st.from_regex(r"[a-z0-9 ]{60,140}", fullmatch=True)
text = (ascii_text | tricky_text | long_text | st.text(max_size=30)).filter(
    lambda value: "${" not in value
)
keys = st.from_regex(r"[A-Za-z0-9_.-]{1,20}", fullmatch=True) | text
leaves = st.none() | st.booleans() | st.integers() | st.floats() | text
trees = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(keys, trees, max_size=4))
def test_any_config_reads_as_omegaconf_writes_it(content):
    config = OmegaConf.create(content)
    assert to_yaml(config) == OmegaConf.to_yaml(config)


class Colour(Enum):
    RED = 1


@pytest.mark.parametrize(
    "content",
    [
        {"a": "1", "b": "1e3", "c": "true", "d": "null", "e": "", "f": "0x10", "g": "1_000"},
        {"a": "${b}", "b": "???", "c": Colour.RED, "d": [], "e": {}, "f": [[], [{}]]},
        {"a": "x" * 200, "b": " lead", "c": "trail ", "d": "line\nline\n", "e": "- dash"},
        {"a": "grüße", "b": "\t", "c": "\x07", "d": "a: b", "e": "#", "f": "'", "g": '"'},
        {"a": 1e-5, "b": float("inf"), "c": float("nan"), "d": -0.0, "e": 10**20},
    ],
)
def test_what_yaml_quotes_folds_or_escapes_is_the_same(content):
    config = OmegaConf.create(content)
    assert to_yaml(config) == OmegaConf.to_yaml(config)
