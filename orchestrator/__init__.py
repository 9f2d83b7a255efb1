"""Sweeps of trainings as Hydra plugins. Importing this package loads nothing heavy."""

__version__ = "0.1.0"
