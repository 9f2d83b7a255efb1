"""Errors of a sweep; Hydra prints only their text and exits with code 1."""

from __future__ import annotations

from hydra.errors import CompactHydraException

from orchestrator.errors import OrchestratorError


class SweepError(OrchestratorError, CompactHydraException):
    """A sweep that cannot be started as it was asked for."""


class RunsFailed(OrchestratorError, CompactHydraException):  # noqa: N818 - reads as what happened
    """Some runs of a sweep failed; it is raised from the first of their exceptions."""
