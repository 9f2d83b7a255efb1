"""``hydra.launcher.dry_run``: what would be submitted, and what it would cost."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.queue.returns import QueueJobReturn
from orchestrator.slurm.client import Limits, SlurmUnreachable
from orchestrator.slurm.cost import Jobs, Submission, describe, estimate
from orchestrator.slurm.cut import arrays
from orchestrator.slurm.resources import Resources, tasks_of
from orchestrator.wording import plural

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hydra.core.utils import JobReturn

    from orchestrator.queue.plan import Plan, Planner
    from orchestrator.slurm.client import SlurmClient
    from orchestrator.slurm.settings import SlurmSettings
    from orchestrator.sweep.compose import Composer

_SHOWN_NAMES = 20


@dataclass(frozen=True)
class DryRun:
    """Plans a launch without a trace of it.

    Args:
        settings: the launcher's.
        raw: the same with its interpolations.
        planner: plans the points.
        composer: composes them.
        client: knows the cluster's limits, where there is one.
    """

    settings: SlurmSettings
    raw: dict[str, Any]
    planner: Planner
    composer: Composer
    client: SlurmClient

    def show(self, points: Sequence[Sequence[str]], first_num: int) -> list[JobReturn]:
        """Print names, jobs and costs; one JobReturn each that says nothing was done here."""
        plans = [
            self.planner.plan(index, first_num + index, point, dry=True)
            for index, point in enumerate(points)
        ]
        missing = self._print_names(plans)
        if missing:
            for line in describe(estimate(self._submission(missing))):
                print(line)
        print("Nothing was submitted (hydra.launcher.dry_run=true).")
        returns: list[JobReturn] = []
        for plan in plans:
            result = QueueJobReturn(self.composer, plan.overrides, plan.num, str(plan.directory))
            result.submitted = True
            returns.append(result)
        return returns

    def _print_names(self, plans: Sequence[Plan]) -> list[Plan]:
        """Print what each run is called and whether it is done; return the runs to submit."""
        missing, seen = [], set()
        for number, plan in enumerate(plans):
            repeated = plan.directory in seen
            seen.add(plan.directory)
            if plan.done is None and not repeated:
                missing.append(plan)
            if number < _SHOWN_NAMES:
                note = " (done already)" if plan.done else " (asked for twice)" if repeated else ""
                print(f"  {plan.directory.name}{note}")
        if len(plans) > _SHOWN_NAMES:
            print(f"  and {len(plans) - _SHOWN_NAMES} more")
        if len(missing) < len(plans):
            rest = plural(len(missing), "run") + " would be submitted."
            print(f"{len(plans) - len(missing)} of {len(plans)} done already; {rest}")
        return missing

    def _submission(self, plans: Sequence[Plan]) -> Submission:
        resources = Resources(self.settings, self.raw)
        wanted = [resources.of(self.composer.compose(plan.overrides)) for plan in plans]
        keys = [json.dumps(each, sort_keys=True, default=str) for each in wanted]
        of = dict(zip(keys, wanted, strict=True))
        groups = [self._jobs(count, of[key]) for key, count in Counter(keys).items()]
        most = self._limits().max_array_size
        return Submission(
            groups=groups,
            arrays=sum(len(arrays(group.jobs, most)) for group in groups),
            jobs_at_a_time=self.settings.array_parallelism,
            past_seconds=[
                record.duration_seconds
                for record in self.planner.completed()
                if record.duration_seconds is not None
            ],
            core_hours_per_year=self.settings.core_hours_per_year,
        )

    def _limits(self) -> Limits:
        try:
            return self.client.limits()
        except SlurmUnreachable:  # it may be asked where there is no cluster
            return Limits()

    def _jobs(self, runs: int, resources: dict[str, Any]) -> Jobs:
        settings, nodes = self.settings, int(resources["nodes"] or 1)
        tasks = tasks_of(resources)
        gpus = nodes * _gpus(resources["gpus_per_node"]) or tasks * _gpus(
            resources["gpus_per_task"]
        )
        cpus = tasks * int(resources["cpus_per_task"] or 1)
        if resources["cpus_per_gpu"] and gpus:
            cpus = gpus * int(resources["cpus_per_gpu"])
        queue = settings.queue
        at_a_time = queue.max_processes or (gpus * queue.max_processes_per_gpu if gpus else cpus)
        return Jobs(
            runs=runs,
            runs_per_job=settings.runs_per_job,
            runs_at_a_time=max(1, min(int(at_a_time), settings.runs_per_job)),
            nodes=nodes,
            cpus=cpus,
            gpus=gpus,
            limit_minutes=float(resources["timeout_min"]),
            restarts=settings.max_num_timeout,
        )


def _gpus(value: Any) -> int:
    """How many GPUs ``2``, ``a100:2`` or ``a100`` are."""
    if value is None:
        return 0
    number = re.search(r"(?:^|:)(\d+)$", str(value))
    return int(number[1]) if number else 1
