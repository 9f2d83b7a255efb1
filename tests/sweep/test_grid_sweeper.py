import importlib
import sys
import time

import pytest
from hydra import version
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException, MissingConfigException
from hydra.plugins.sweeper import Sweeper
from omegaconf import OmegaConf

from hydra_plugins.hydra_orchestrator.grid_sweeper import GridSweeper
from orchestrator.errors import OrchestratorError
from orchestrator.sweep import grid
from orchestrator.sweep.compose import Composer
from orchestrator.sweep.errors import RunsFailed, SweepError
from orchestrator.sweep.points import Points

QUIET = ["hydra/hydra_logging=none", "hydra/job_logging=none"]

COMMAND_LINES = [
    [],
    ["seed=1,2,3"],
    ["seed=1,2", "model=mlp,cnn"],
    ["model=glob(*n*)", "lr=1e-3,1e-4"],
    ["seed=range(3)", "name='a, b','c=d'", "~words"],
    ["+fresh=choice(1,[2,3],{a:4})", "++table.z=5", "lr=null,1"],
    ["seed=5,6", "lr=1,2", "seed=7,8"],
    ["model=glob(nothing*)"],
    ["hydra.sweeper.max_batch_size=2", "seed=range(5)", "lr=1"],
    ["hydra.sweeper.max_batch_size=5", "seed=1"],
    ["+experiment=own", "lr=1,2"],
    ["+experiment=own", "seed=9", "model=cnn,mlp"],
    ["+experiment=big", "lr=1,2"],
    ["name=${seed},${model.name}", "seed=1"],
]


@pytest.fixture
def run(hydra_sweep_runner, hydra_restore_singletons, configs, tmp_path):
    """Run a multirun command line in this process and return its sweep object."""
    version.setbase("1.3")

    def _run(*overrides, task=None, sweeper="grid", launcher="basic"):
        choose = [f"hydra/sweeper={sweeper}", f"hydra/launcher={launcher}", *QUIET]
        return hydra_sweep_runner(
            calling_file=str(configs.parent / "app.py"),
            calling_module=None,
            task_function=task,
            config_path="conf",
            config_name="config",
            overrides=[*choose, *overrides],
            temp_dir=tmp_path / "sweep",
        )

    return _run


@pytest.fixture
def refusal(run):
    """The text of the error that a command line ends with, before any job has run."""

    def _refusal(error, *overrides, **options):
        ran = []
        with pytest.raises(error) as raised, run(*overrides, task=ran.append, **options):
            pass
        assert ran == []
        return str(raised.value)

    return _refusal


def jobs(sweep):
    """What each job of each batch was: number, overrides, composed task config."""
    return [
        [(job.hydra_cfg.hydra.job.num, job.overrides, OmegaConf.to_yaml(job.cfg)) for job in batch]
        for batch in sweep.returns
    ]


def test_hydra_discovers_it():
    names = [plugin.__name__ for plugin in Plugins.instance().discover(Sweeper)]
    assert GridSweeper.__name__ in names


@pytest.mark.parametrize("command", COMMAND_LINES, ids=" ".join)
def test_the_jobs_are_those_of_the_basic_sweeper(run, command):
    with run(*command, sweeper="basic") as sweep:
        expected = jobs(sweep)
    with run(*command) as sweep:
        assert jobs(sweep) == expected


def test_any_launcher_takes_the_lazy_points(run):
    command = ["seed=1,2", "model=mlp,cnn", "hydra.sweeper.max_batch_size=3"]
    with run(*command) as sweep:
        expected = jobs(sweep)
    with run(*command, "hydra.launcher.n_jobs=1", launcher="joblib") as sweep:
        assert jobs(sweep) == expected


def test_the_multirun_file_is_that_of_the_basic_sweeper(run, tmp_path):
    texts = []
    for sweeper in ("basic", "grid"):
        with run("seed=1,2", sweeper=sweeper):
            config = OmegaConf.load(tmp_path / "sweep/multirun.yaml")
        for key in ("sweeper", "overrides", "runtime.choices"):
            OmegaConf.update(config, f"hydra.{key}", None, merge=False)
        texts.append(OmegaConf.to_yaml(config))
    assert texts[0] == texts[1]


def test_the_first_job_starts_before_the_sweep_is_composed(run, monkeypatch):
    composed = []
    for name in ("compose", "task_config"):
        original = getattr(Composer, name)
        monkeypatch.setattr(
            Composer,
            name,
            lambda self, o, original=original: composed.append(o) or original(self, o),
        )
    seen = []

    class Stop(BaseException):
        pass

    def task(config):
        seen.append(len(composed))
        raise Stop

    with pytest.raises(Stop), run("seed=range(20)", "lr=range(30)", "model=mlp,cnn", task=task):
        pass
    assert seen == [20 + 29 + 1]
    assert len({tuple(point) for point in composed}) == len(composed)


def test_a_typo_in_the_last_axis_fails_before_the_first_job(refusal):
    command = ["seed=1,2", "model=mlp,typo", "hydra.sweeper.max_batch_size=1"]
    assert "model/typo" in refusal(MissingConfigException, *command)


@pytest.mark.parametrize("command", [["train.steps=1,x"], ["nokey=1,2"], ["~words,"]])
def test_values_that_do_not_compose_raise_what_hydra_raises(refusal, command):
    expected = refusal(HydraException, *command, sweeper="basic")
    assert refusal(HydraException, *command) == expected


@pytest.mark.parametrize(
    ("command", "hint"),
    [
        ("train.step=1,2", "Did you mean train.steps?"),
        ("model.widht=1,2", "Did you mean model.width?"),
        ("steps=1,2", "Did you mean train.steps or optim.schedule.steps?"),
    ],
)
def test_a_mistyped_key_gets_the_nearest(refusal, command, hint):
    expected = refusal(HydraException, command, sweeper="basic")
    assert refusal(HydraException, command).splitlines() == [*expected.splitlines(), hint]


def test_an_app_may_look_at_the_first_point_before_any_job(start, configs):
    looked = []

    def look(config, swept):
        looked.append((config.seed, "hydra" in config, swept))
        if config.seed == 3:
            raise OrchestratorError("no such task")

    composer = Composer(*start(configs))
    axes = [("seed", ["seed=1", "seed=2"]), ("lr", ["lr=1"]), ("+x", ["+x=1", "+x=2"])]
    grid._look(look, Points(axes, composer))
    assert looked == [(1, False, {"seed", "x"})]
    with pytest.raises(SweepError, match="no such task"):
        grid._look(look, Points([("seed", ["seed=3"])], composer))


def test_an_interval_is_refused_with_advice(refusal):
    text = refusal(SweepError, "lr=interval(0,1)")
    assert "'lr=interval(0,1)'" in text
    assert "key=range(1,10)" in text


def test_a_batch_of_nothing_is_refused(refusal):
    text = refusal(SweepError, "hydra.sweeper.max_batch_size=0", "seed=1,2")
    assert "max_batch_size is 0" in text


def test_swept_experiments_that_set_the_sweep_are_refused(refusal):
    text = refusal(SweepError, "+experiment=big,own")
    assert text.startswith("'+experiment=own' sets hydra.sweeper.params (seed)")
    assert "a sweep of its own" in text


def test_one_experiment_may_set_the_sweep(run):
    with run("+experiment=own", "lr=1,2") as sweep:
        assert [job.cfg.seed for job in sweep.returns[0]] == [1, 1, 2, 2]


def fail_on_even(config):
    if config.seed % 2 == 0:
        raise ValueError(f"seed {config.seed}\nwith a second line")
    return config.seed


def test_failed_runs_are_told_after_all_batches(run):
    ran = []

    def task(config):
        ran.append(config.seed)
        return fail_on_even(config)

    command = ["seed=range(1,11)", "hydra.sweeper.max_batch_size=3"]
    with pytest.raises(RunsFailed) as raised, run(*command, task=task):
        pass
    assert ran == list(range(1, 11))
    assert str(raised.value) == (
        "5 of 10 runs failed: seed=2; seed=4; seed=6; and 2 more (first error: ValueError: seed 2)."
    )
    assert isinstance(raised.value, (OrchestratorError, HydraException))
    assert isinstance(raised.value.__cause__, ValueError)


def test_a_launcher_that_resumes_is_said_to():
    class Launcher:
        resumes = True

        def launch(self, points, initial_job_idx):
            return [JobReturn() for _ in points]

    with pytest.raises(RunsFailed) as raised:
        grid._launch([Points([("a", ["a=1"])]), Points([])], Launcher())
    assert str(raised.value) == (
        "2 of 2 runs failed: a=1; the run without overrides (first error: no result came back). "
        "Run the same command again to run only what is missing."
    )
    assert raised.value.__cause__ is None


def test_runs_that_never_began_are_not_said_to_be_missing():
    failures = grid._Failures()
    job = JobReturn(status=JobStatus.FAILED, _return_value=KeyError())
    job.began = False
    failures.add(job, [])
    assert failures.text(resumes=True).endswith("(first error: KeyError).")


def test_a_run_counts_as_done_only_when_completed():
    failures = grid._Failures()
    failures.add(JobReturn(status=JobStatus.COMPLETED, _return_value=1), [])
    failures.add(JobReturn(status=JobStatus.UNKNOWN), [])
    failures.add(JobReturn(status=JobStatus.FAILED, _return_value=KeyError()), ["a=1"])
    assert (failures.runs, failures.failed) == (3, 2)
    assert failures.text(resumes=False).endswith("(first error: KeyError).")


def test_every_launcher_composes_from_the_frozen_files(run, configs):
    def task(config):
        for file in configs.rglob("*.yaml"):
            file.unlink()
        return config.model.name

    with run("model=mlp,cnn", "seed=1,2", task=task) as sweep:
        names = [job.return_value for job in sweep.returns[0]]
    assert names == ["mlp", "mlp", "cnn", "cnn"]


def test_the_plugin_module_imports_next_to_nothing():
    name = "hydra_plugins.hydra_orchestrator.grid_sweeper"
    heavy = {m for m in sys.modules if m.startswith("orchestrator.sweep.")}
    kept = {m: sys.modules.pop(m) for m in [*heavy, name] if m in sys.modules}
    try:
        start = time.process_time()
        importlib.import_module(name)
        spent = time.process_time() - start
        loaded = {m for m in sys.modules if m.startswith("orchestrator.sweep.")}
        assert loaded == set()
        assert spent < 0.05
    finally:
        sys.modules.update(kept)
