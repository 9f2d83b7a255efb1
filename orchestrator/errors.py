"""Errors whose text is a sentence: what it got, what it expected, what to do next."""


class OrchestratorError(Exception):
    """An error that a user can act on; its text is shown without a traceback."""
