"""The command of a batch script: what starts the first process of a job, and keeps its exit code."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

# Slurm's warning would end a job that is still setting itself up; it is announced again, if at all,
# by Slurm's own requeue or by the limit. The job's first process takes it as soon as it can.
IGNORE_WARNING = "trap '' USR2"
# A shell that waits for its job's first process: Slurm's warning, which only the shell gets, is
# handed on; the signal that ends the job, which all get, does not end the shell before the runs
# have their records. An interrupted `wait` returns the signal's number and is tried again. (The
# user's own lines may have said `set -eu`.)
_WAIT = """\
{command} &
first=$!
trap 'kill -USR2 "$first" 2>/dev/null || :' USR2
trap : TERM
status=0; wait "$first" || status=$?
while [ "$status" -gt 128 ] && kill -0 "$first" 2>/dev/null; do
  status=0; wait "$first" || status=$?
done
if [ "$status" -gt 128 ]; then
  again=0; wait "$first" 2>/dev/null || again=$?
  case "$again" in 127|-*) ;; *) status=$again ;; esac
fi"""


def batch_command(python: str, stem: str, srun: Sequence[str], teardown: Sequence[str]) -> str:
    """The lines that do a job's work; its exit status is that of the runs, whatever comes after.

    Args:
        python: a shell command that starts Python.
        stem: see `orchestrator.slurm.start`.
        srun: its words, where it is to start the job's tasks; empty where it is not.
        teardown: the user's lines of shell for the end.
    """
    work = f"{python} -u -m orchestrator.slurm.start {shlex.quote(stem)}"
    if not srun and not teardown:
        return f"exec {work}"
    waiting = _WAIT.format(command=" ".join((shlex.join(srun), work)) if srun else work)
    return "\n".join(
        (waiting, *(("", "# teardown", "set +e", *teardown) if teardown else ()), 'exit "$status"')
    )
