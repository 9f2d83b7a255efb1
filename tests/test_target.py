"""The function that a config names, and what is said where there is none."""

from __future__ import annotations

import importlib
import sys

import pytest

from orchestrator.errors import OrchestratorError
from orchestrator.target import find_function

TRAIN = """
from math import sqrt
RATE = 3
class Trainer:
    @staticmethod
    def fit(cfg): return cfg
def train(cfg): return cfg
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A package in the current directory, as ``python -m`` finds it."""
    package = tmp_path / "some_project"
    package.mkdir()
    (package / "train.py").write_text(TRAIN)
    (package / "needs.py").write_text("import math\nimport no_such_module")
    (package / "broken.py").write_text("def f(:\n")
    (package / "raises.py").write_text("\n\nraise RuntimeError('first:\\n  no GPU')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield package
    for name in [name for name in sys.modules if name.startswith("some_project")]:
        del sys.modules[name]


def test_a_function_or_a_method_is_found(project):
    assert find_function("some_project.train.train", "t")(5) == 5
    assert find_function("some_project.train.Trainer.fit", "t")(5) == 5


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (
            "some_project.train.trian",
            "some_project.train has no 'trian'. Did you mean some_project.train.train?",
        ),
        (
            "some_project.trian.train",
            "some_project has no 'trian'. Did you mean some_project.train?",
        ),
        ("some_projct.train.train", "there is no module 'some_projct'; "),
        ("some_projct.train.train", "Did you mean some_project?"),
        ("train", "there is no module 'train'; "),
        ("some_project.train.RATE", "RATE is of type int, expected a function"),
        (
            "some_project.train",
            "config. Did you mean some_project.train.Trainer or some_project.train.train?",
        ),
        ("some_project..train", "some_project..train is not a dotted path"),
        ("some_project.needs.train", "ModuleNotFoundError: No module named 'no_such_module' ("),
        ("some_project.needs.train", "needs.py, line 2)"),
        ("some_project.broken.train", "its import failed: SyntaxError: invalid syntax ("),
        ("some_project.broken.train", "broken.py, line 1)"),
        ("some_project.raises.train", "RuntimeError: first: no GPU ("),
        ("some_project.raises.train", "raises.py, line 3)"),
    ],
)
def test_what_is_wrong_is_one_sentence(project, path, text):
    with pytest.raises(OrchestratorError) as caught:
        find_function(path, "task._target_")
    said = str(caught.value)
    assert said.startswith(f"task._target_={path}")
    assert text in said
    assert "\n" not in said
