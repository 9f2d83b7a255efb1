"""The settings of ``hydra/launcher=slurm``, as ``--cfg hydra`` shows them."""

# No `from __future__ import annotations`, as in `orchestrator.settings`.
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional  # noqa: UP035 - OmegaConf reads these at run time

from orchestrator.queue.settings import QueueSettings


@dataclass(repr=False, eq=False)
class SlurmSettings:
    """Runs jobs on a Slurm cluster, through submitit.

    The first three groups are those of hydra-submitit-launcher's ``submitit_slurm``, by the same
    names; a value may be an interpolation of each run's own config (``${model.gpus}``).
    """

    _target_: str = "hydra_plugins.hydra_orchestrator.slurm_launcher.SlurmLauncher"

    # --- What each job asks for ---
    # Minutes until Slurm ends a job.
    timeout_min: Any = 60
    cpus_per_task: Any = None
    gpus_per_node: Any = None
    tasks_per_node: Any = 1
    # Memory on each node, in GB.
    mem_gb: Any = None
    nodes: Any = 1
    # The name that squeue shows.
    name: str = "${hydra.job.name}"
    partition: Optional[str] = None  # noqa: UP045 - OmegaConf reads these
    qos: Optional[str] = None  # noqa: UP045
    account: Optional[str] = None  # noqa: UP045
    constraint: Optional[str] = None  # noqa: UP045
    exclude: Optional[str] = None  # noqa: UP045
    nodelist: Optional[str] = None  # noqa: UP045
    gres: Any = None
    cpus_per_gpu: Any = None
    gpus_per_task: Any = None
    mem_per_gpu: Any = None
    mem_per_cpu: Any = None
    comment: Optional[str] = None  # noqa: UP045
    # Anything else that sbatch takes, e.g. {mail-user: me@lab.org, mail-type: END}.
    additional_parameters: Dict[str, Any] = field(default_factory=dict)  # noqa: UP006

    # --- Around the runs ---
    # Lines of shell before the runs of a job, and after them (pre and post lines).
    setup: Optional[List[str]] = None  # noqa: UP006, UP045
    teardown: Optional[List[str]] = None  # noqa: UP006, UP045
    # The command that starts Python there. null: this interpreter.
    python: Optional[str] = None  # noqa: UP045
    # Start the job by srun. null: where it has several tasks.
    use_srun: Optional[bool] = None  # noqa: UP045
    srun_args: Optional[List[str]] = None  # noqa: UP006, UP045
    # Scripts, pickles and Slurm's own logs. null: .sweeps/<sweep_id>/slurm in the sweep's directory.
    submitit_folder: Optional[str] = None  # noqa: UP045
    stderr_to_stdout: bool = False
    # A JSON file of cluster settings, in the form of schedule.py or experiment_manager.
    cluster_file: Optional[str] = None  # noqa: UP045

    # --- How many, and how often ---
    # Jobs that run at a time, of the whole sweep.
    array_parallelism: int = 256
    # Runs in one job: they share its GPUs and cores through the local queue, see `queue`.
    runs_per_job: int = 1
    # How the runs of one job share it: the settings of hydra/launcher=gpu_queue.
    queue: QueueSettings = field(default_factory=QueueSettings)
    # How often a job that reaches its time limit is put back into Slurm's queue, to go on from the
    # checkpoint that its runs have saved. A job that is preempted always is.
    max_num_timeout: int = 0
    # Seconds before the time limit at which runs are told (orchestrator.is_preempted()).
    signal_delay_s: int = 120

    # --- The launcher itself ---
    # false: submit and return. orchestrator-status shows the runs; the same command again takes
    # up waiting for them.
    wait: bool = True
    # Ctrl+C: cancel (all jobs of the sweep) or leave (them to Slurm). A second one always leaves.
    on_interrupt: str = "cancel"
    # Show what would be submitted and what it would cost; submit nothing.
    dry_run: bool = False
    # Core hours a year that the account may use: dry_run shows the share.
    core_hours_per_year: Optional[float] = None  # noqa: UP045
    # Longest time between two looks at Slurm's queue, in seconds; at most 10.
    poll_interval_s: float = 10.0
