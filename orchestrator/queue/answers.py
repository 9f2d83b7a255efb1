"""What each point of a launch came to: Hydra's job returns, and what the user is told."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.queue.returns import QueueJobReturn
from orchestrator.queue.wire import Ended
from orchestrator.record import ErrorInfo, RunRecord, RunState, Versions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from orchestrator.queue.context import Launch
    from orchestrator.queue.plan import Plan


class Answers:
    """Collects one answer for each point.

    Args:
        context: the launch's parts.
        total: how many points there are.
        first_num: Hydra's number of the first.
    """

    def __init__(self, context: Launch, total: int, first_num: int) -> None:
        self._context = context
        self._first_num = first_num
        self.returns: list[QueueJobReturn | None] = [None] * total
        # What the code was when the runs that answer were done.
        self.answered_by: set[Versions] = set()
        # Runs whose final record is not on the disk.
        self.unsaved = 0
        # By the index of the point that is doing them: points that ask for the same run.
        self._repeats: dict[int, list[Plan]] = {}
        self._first_in: dict[str, int] = {}

    @property
    def any_repeats(self) -> bool:
        """Whether a point waits for another that does the same run."""
        return bool(self._repeats)

    def is_repeat(self, plan: Plan) -> bool:
        """Whether an earlier point asks for the same run, whose answer is then this one's."""
        first = self._first_in.setdefault(str(plan.directory), plan.index)
        if first == plan.index:
            return False
        self._repeats.setdefault(first, []).append(plan)
        if self.returns[first] is not None:
            self._answer_repeats(first)
        return True

    def cannot_start(
        self, index: int, num: int, overrides: Sequence[str], error: Exception
    ) -> None:
        """A point has failed before it could become a job."""
        context = self._context
        result = QueueJobReturn(context.composer, overrides, num, "")
        result.fail(error)
        self.returns[index] = result
        record = RunRecord(
            model_name=" ".join(overrides),
            sweep_id=context.sweep.sweep_id,
            index=num,
            overrides=tuple(overrides),
            state=RunState.FAILED,
            error=ErrorInfo.of(error),
        )
        context.sweep.add_unstarted(record)
        context.progress.end(index, overrides, record, "")
        self._answer_repeats(index)

    def take_recorded(self, plan: Plan, record: RunRecord) -> None:
        """A run that was finished before answers; nothing is started."""
        self._context.sweep.add_run(plan.num, plan.directory, plan.who.hyperparams)
        self._result(plan).take(record, None)
        self.answered_by.add(record.versions)
        self._context.ended(plan, Ended(record, skipped=True))
        self._context.progress.skip(plan.overrides)

    def refuse(self, plan: Plan, record: RunRecord) -> None:
        """A run could not be handed on; all that there is to say of it is said for all of them."""
        self._result(plan).take(record, None)
        self._context.progress.states[record.state] += 1

    def leave(self, plan: Plan) -> None:
        """A run waits, or runs, on a cluster; nobody waits for it here."""
        self._result(plan).submitted = True

    def take(self, plan: Plan, message: Ended) -> None:
        """A run has ended for good."""
        context, record = self._context, message.record
        self.unsaved += not message.saved
        context.planner.remember(plan, record)
        self._result(plan).take(record, message.value)
        if message.warning:
            context.progress.say(f"{record.model_name}: {message.warning}")
        context.progress.end(plan.index, plan.overrides, record, str(plan.directory))
        context.ended(plan, message)
        context.sweep.write_partial_now_and_then()

    def _result(self, plan: Plan) -> QueueJobReturn:
        result = QueueJobReturn(
            self._context.composer, plan.overrides, plan.num, str(plan.directory)
        )
        self.returns[plan.index] = result
        self._answer_repeats(plan.index)
        return result

    def _answer_repeats(self, first: int) -> None:
        """The same run was asked for twice in one sweep: it is run once and answers both."""
        for plan in self._repeats.pop(first, ()):
            self.returns[plan.index] = self.returns[first]
            self._context.progress.repeat(plan.overrides)
