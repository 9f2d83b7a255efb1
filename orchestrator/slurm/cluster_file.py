"""JSON files of cluster settings, in our own keys or in those of two other tools.

* experiment_manager: what ``SLURM(...)`` takes and ``SLURM.load`` reads
  (``experiment_manager/slurm_configuration.py`` and ``example/slurm.json`` of
  https://github.com/SamuelePolimi/experiment_manager; its README says ``python_runner`` for what
  its code calls ``job_runner``).
* PyExpUtils: the ``clusters/*.json`` that a ``schedule.py`` or ``scripts/slurm.py`` reads
  (``PyExpUtils/runner/Slurm.py`` of https://github.com/andnp/PyExpUtils, all its ages). Files
  looked at: ``clusters/`` of pranayajajoo/policy-parameterization, andnp/acceleration-v2 (where
  ``nodes`` are CPU cores, as the README of andnp/rl-control-template explains),
  andnp/rl-control-template, lolanff/rep-transfer, steventango/forager-agents and
  steventango/continual-foragax-agents (with GPUs).
"""

from __future__ import annotations

import difflib
import json
import logging
import math
import re
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from orchestrator.slurm.amounts import minutes_of
from orchestrator.slurm.settings import SlurmSettings
from orchestrator.sweep.errors import SweepError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

_log = logging.getLogger(__name__)

_OWN = {field.name for field in fields(SlurmSettings)} - {"_target_", "cluster_file"}
_QUEUE = {field.name for field in fields(SlurmSettings().queue)} - {"_target_"}
# Lines of shell by nature: the one place where a value reaches a shell as it is.
_SHELL = {"setup", "teardown"}
# The types do not say so: in a preset they may be interpolations.
_NUMBERS = ("timeout_min", "cpus_per_task", "tasks_per_node", "mem_gb", "nodes")

_EXPERIMENT_MANAGER = {"n_gpus", "n_cpus", "memory", "pre_script", "post_script"}
_PYEXPUTILS = {
    *("type", "cores", "coresPerNode", "tasksPerNode", "memPerCpu", "mem_per_core", "sequential"),
    *("threads_per_task", "gpus", "tasks_per_core", "tasks_per_vmap", "email", "emailType"),
}
_NOT_USED = {
    "python_runner": "the program that you launch is what runs",
    "job_runner": "the program that you launch is what runs",
    "output": "each run has its log in its own directory",
    "error": "each run has its log in its own directory",
    "log_path": "each run has its log in its own directory",
    "xla_python_client_mem_fraction": "runs that share a GPU get their share from the queue",
}
_KNOWN = {*_OWN, *_EXPERIMENT_MANAGER, *_PYEXPUTILS, *_NOT_USED, "time"}

_MEMORY = re.compile(r"([0-9]+)\s*([KMGT]?)(?:I?B)?", re.IGNORECASE)
_MEGABYTES = {"K": 1 / 1024, "": 1, "M": 1, "G": 1024, "T": 1024**2}
_GPUS = re.compile(r"(?:[A-Za-z][\w.-]*:)?([0-9]+)", re.ASCII)
_OPTION = re.compile(r"[A-Za-z][\w-]*", re.ASCII)


def read_cluster_file(path: Path) -> dict[str, Any]:
    """The settings of ``hydra/launcher=slurm`` that a file of cluster settings stands for.

    Args:
        path: a JSON file; its keys may be ours (`SlurmSettings`), experiment_manager's or
            PyExpUtils'.

    Returns:
        Values by the names of `SlurmSettings`, only those that the file decides on; ``queue`` and
        ``additional_parameters`` are mappings that decide on their own keys only.

    Raises:
        SweepError: the file cannot be read, is not JSON, or has a key or a value that means
            nothing here.
    """
    file = _File(path, _content(path))
    if file.keys & _PYEXPUTILS:
        _from_pyexputils(file)
    _from_experiment_manager(file)
    _from_own_keys(file)
    for key in sorted(file.keys & set(_NOT_USED)):
        _log.info("%s: %s is not used: %s.", path, key, _NOT_USED[key])
    return file.settings


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"), object_pairs_hook=_without_duplicates)
    except FileNotFoundError as error:
        raise SweepError(
            f"There is no cluster file {path}. Correct hydra.launcher.cluster_file."
        ) from error
    except json.JSONDecodeError as error:
        raise SweepError(
            f"{path}, line {error.lineno}, column {error.colno}: {error.msg}. A cluster file is one "
            "JSON object, without comments; see docs/clusters.md."
        ) from error
    except _DuplicateKey as error:
        raise SweepError(f"{path}: {error} is there twice. Keep one.") from error
    except (OSError, ValueError) as error:
        raise SweepError(f"The cluster file {path} cannot be read: {error}.") from error
    if not isinstance(content, dict):
        raise SweepError(
            f"{path} holds {type(content).__name__}; expected one JSON object of settings, "
            'e.g. {"account": "def-someprof", "time": "3:00:00"}.'
        )
    return content


class _DuplicateKey(Exception):  # noqa: N818 - never leaves this module
    """A key that a JSON object has twice; the parser would drop the first."""


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise _DuplicateKey(key)
        content[key] = value
    return content


class _File:
    """What a file says, and the settings that have been made of it so far."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path = path
        self.settings: dict[str, Any] = {}
        self._source: dict[str, str] = {}
        self._content = content
        for key in content:
            if key not in _KNOWN:
                raise self.unknown(key, _KNOWN)

    @property
    def keys(self) -> set[str]:
        return set(self._content)

    def get(self, key: str) -> Any:
        return self._content.get(key)

    def wrong(self, key: str, expected: str) -> SweepError:
        return SweepError(f"{self.path}: {key} is {self.get(key)!r}; expected {expected}.")

    def unknown(self, key: str, known: Iterable[str], within: str = "") -> SweepError:
        near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.6)
        hint = f"Did you mean {within}{near[0]}? " if near else ""
        return SweepError(
            f"{self.path}: unknown key {within}{key}. {hint}Options of sbatch that have no key of "
            "their own go into additional_parameters; see docs/clusters.md."
        )

    def put(self, setting: str, value: Any, key: str) -> None:
        """Set a setting; ``queue.x`` and ``additional_parameters.x`` are entries of mappings."""
        if setting in self._source:
            raise SweepError(
                f"{self.path}: {self._source[setting]} and {key} both decide on {setting}. Keep one."
            )
        self._source[setting] = key
        node, _, entry = setting.partition(".")
        if entry:
            self.settings.setdefault(node, {})[entry] = value
        else:
            self.settings[node] = value

    def text(self, key: str) -> str | None:
        value = self.get(key)
        if value is None or (isinstance(value, str) and _is_one_line(value)):
            return value
        raise self.wrong(key, "a text of one line, not empty")

    def count(self, key: str, least: int = 1) -> int | None:
        value = self.get(key)
        if isinstance(value, str) and value.isascii() and value.isdigit():
            value = int(value)
        if value is None or (type(value) is int and value >= least):
            return value
        raise self.wrong(key, f"a whole number of at least {least}")

    def lines(self, key: str) -> list[str] | None:
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong(key, 'a list of lines of shell, e.g. ["module load python"]')
        return value

    def minutes(self, key: str) -> int | None:
        """A time limit as Slurm writes it, rounded up; a plain number is minutes."""
        value = self.get(key)
        if value is None:
            return None
        minutes = minutes_of(str(value))
        if minutes is None:
            raise self.wrong(key, 'a time such as "90" (minutes), "HH:MM:SS" or "D-HH:MM:SS"')
        return int(minutes)

    def megabytes(self, key: str, *, plain: str = "M") -> int | None:
        """An amount of memory as Slurm writes it, rounded up.

        Args:
            key: the key.
            plain: the unit of a number that is not a text; one in a text is megabytes, as in Slurm.
        """
        value = self.get(key)
        if value is None:
            return None
        megabytes = _megabytes(value, plain)
        if megabytes is None:
            raise self.wrong(key, 'memory such as "4000" (MB), "4000M" or "4G"')
        return megabytes


def _megabytes(value: Any, plain: str) -> int | None:
    amount = None
    if isinstance(value, str) and (found := _MEMORY.fullmatch(value.strip())):
        amount = int(found.group(1)) * _MEGABYTES[found.group(2).upper()]
    elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        amount = value * _MEGABYTES[plain]
    return math.ceil(amount) if amount is not None and amount > 0 else None


def _from_experiment_manager(file: _File) -> None:
    # PyExpUtils writes a time limit in the same way.
    if (minutes := file.minutes("time")) is not None:
        file.put("timeout_min", minutes, "time")
    if (cpus := file.count("n_cpus")) is not None:
        file.put("cpus_per_task", cpus, "n_cpus")
    if (gpus := file.count("n_gpus", least=0)) is not None:
        file.put("gpus_per_node", gpus or None, "n_gpus")
    if (megabytes := file.megabytes("memory")) is not None:
        # submitit writes 1024ths of a GB back as megabytes, so Slurm is asked for just these.
        file.put("mem_gb", megabytes / 1024, "memory")
    # Its script has the lines in this order, around the program.
    for key, setting in (("pre_script", "setup"), ("post_script", "teardown")):
        if (lines := file.lines(key)) is not None:
            file.put(setting, lines, key)


def _from_pyexputils(file: _File) -> None:
    if file.get("type") not in (None, "single_node", "multi_node"):
        raise file.wrong("type", "single_node or multi_node")
    if (file.count("tasks_per_vmap") or 1) > 1:
        raise file.wrong("tasks_per_vmap", "1: a cluster file cannot put several runs in a process")
    _put_memory_per_core(file)
    for key, option in (("email", "mail-user"), ("emailType", "mail-type")):
        if (text := file.text(key)) is not None:
            file.put(f"additional_parameters.{option}", text, key)
    _put_packing(file)


def _put_memory_per_core(file: _File) -> None:
    # PyExpUtils takes a bare number for gigabytes under the newer name only.
    for key, plain in (("memPerCpu", "M"), ("mem_per_core", "G")):
        if (megabytes := file.megabytes(key, plain=plain)) is not None:
            file.put("mem_per_cpu", f"{megabytes}M", key)


def _put_packing(file: _File) -> None:
    """How many runs share a job: each at its cores, and so many one after the other."""
    cores, in_a_row, key = _cores(file)
    threads = file.count("threads_per_task") or 1
    at_a_time = max(1, (cores or 1) // threads) * (file.count("tasks_per_core") or 1)
    runs = at_a_time * in_a_row
    if cores is not None:
        file.put("nodes", 1, key)
        file.put("cpus_per_task", cores, key)
    if cores is not None or runs > 1:
        file.put("runs_per_job", runs, key)
    if runs > 1:
        file.put("queue.max_processes", at_a_time, key)
    _put_gpus(file, at_a_time, runs)


def _cores(file: _File) -> tuple[int | None, int, str]:
    """The cores of a job on one node, the runs one after the other on each, and the key to blame.

    Our jobs are on one node each. As the runs of a job are independent, n nodes' worth of cores
    is n jobs of ours.
    """
    cores, nodes = file.count("cores"), file.count("nodes")
    if cores is None and file.get("coresPerNode") is None:
        # The oldest form: nodes are CPU cores, tasks are those in a row on each.
        if file.get("tasksPerNode") is not None and file.get("sequential") is not None:
            raise file.wrong("tasksPerNode", "it without sequential, or sequential alone")
        in_a_row = file.count("tasksPerNode") or file.count("sequential") or 1
        return nodes, in_a_row, "sequential" if nodes is None else "nodes"
    if file.get("tasksPerNode") is not None:
        # Between two versions it has meant both.
        raise file.wrong(
            "tasksPerNode", "no such key beside cores: write sequential, or coresPerNode"
        )
    per_node = file.count("coresPerNode")
    in_a_row = file.count("sequential") or 1
    if cores is None:
        return per_node, in_a_row, "coresPerNode"
    nodes = nodes or math.ceil(cores / (per_node or cores))
    return math.ceil(cores / nodes), in_a_row, "cores"


def _put_gpus(file: _File, at_a_time: int, runs: int) -> None:
    asked = file.get("gpus")
    if asked is None:
        return
    found = None if isinstance(asked, bool) else _GPUS.fullmatch(str(asked))
    if found is None:
        raise file.wrong("gpus", 'a number of GPUs, or a kind and a number such as "a100:2"')
    gpus = int(found.group(1))
    if gpus == 0:
        file.put("gpus_per_node", None, "gpus")
        return
    file.put("gpus_per_node", asked if ":" in str(asked) else gpus, "gpus")
    if runs > 1 and gpus < at_a_time:
        file.put("queue.max_processes_per_gpu", math.ceil(at_a_time / gpus), "gpus")
    elif runs > 1 and gpus >= 2 * at_a_time:
        file.put("queue.gpus_per_job", gpus // at_a_time, "gpus")


def _from_own_keys(file: _File) -> None:
    own = {key: file.get(key) for key in file.keys & _OWN}
    if file.keys & _PYEXPUTILS:
        own.pop("nodes", None)
    for key in sorted(own.keys() & _SHELL):
        file.lines(key)
    _check_mappings(file, own)
    _check_types(file, {key: value for key, value in own.items() if key not in _SHELL})
    _check_numbers(file, own)
    for key in sorted(own):
        if key in ("queue", "additional_parameters"):
            for entry, value in own[key].items():
                file.put(f"{key}.{entry}", value, f"{key}.{entry}")
        else:
            file.put(key, own[key], key)


def _check_numbers(file: _File, own: dict[str, Any]) -> None:
    for key in _NUMBERS:
        value = own.get(key)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (is_number and math.isfinite(value) and value > 0):
            raise file.wrong(key, "a number above 0")


def _check_mappings(file: _File, own: dict[str, Any]) -> None:
    for key in own.keys() & {"queue", "additional_parameters"}:
        if not isinstance(own[key], dict):
            raise file.wrong(key, "a JSON object")
    for entry in own.get("queue", {}):
        if entry not in _QUEUE:
            raise file.unknown(entry, _QUEUE, within="queue.")
    for option in own.get("additional_parameters", {}):
        # The option's name is not quoted in the script that Slurm gets.
        if not _OPTION.fullmatch(option):
            raise SweepError(
                f"{file.path}: additional_parameters has {option!r}; expected the name of an option "
                'of sbatch without its dashes, e.g. "mail-user".'
            )


def _check_types(file: _File, own: dict[str, Any]) -> None:
    schema = OmegaConf.structured(SlurmSettings)
    for key, value in sorted(own.items()):
        # A line break would end the comment that carries an option, quoted or not.
        if not _is_one_line(value):
            raise file.wrong(key, "texts of one line, not empty")
        if "${" in json.dumps(value):
            raise file.wrong(key, "plain values; a preset may look them up in each run's config")
        try:
            OmegaConf.merge(schema, {key: value})
        except OmegaConfBaseException as error:
            what = str(error).partition("\n")[0]
            raise SweepError(
                f"{file.path}: {error.full_key or key}: {what}. Correct it."
            ) from error


def _is_one_line(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_one_line(item) for pair in value.items() for item in pair)
    if isinstance(value, list):
        return all(_is_one_line(item) for item in value)
    return not isinstance(value, str) or (value.isprintable() and bool(value.strip()))
