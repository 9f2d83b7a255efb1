"""``orchestrator-status pause | drain | resume``: orders to a sweep that runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from orchestrator.cli.output import printable, reported_errors
from orchestrator.errors import OrchestratorError
from orchestrator.live_sweeps import choose_gpus, choose_sweep
from orchestrator.queue.control import CONTROL_NAME, Orders, change_orders

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def _order(
    directory: str,
    words: Sequence[str],
    wanted: str | None,
    change: Callable[[Orders, list[str]], Orders],
    say: Callable[[Orders, str], str],
) -> None:
    with reported_errors():
        path, sweep = choose_sweep(directory, wanted)
        gpus = choose_gpus(words, sweep)
        file = path / CONTROL_NAME
        try:
            orders = change_orders(file, lambda now: change(now, [gpu.uuid for gpu in gpus]))
        except OSError as error:
            msg = f"{file} cannot be written: {error}. Type it as the user whose sweep it is."
            raise OrchestratorError(msg) from error
        where = f"GPU {', '.join(gpu.label for gpu in gpus)}" if gpus else ""
        text = f"Sweep {sweep.sweep_id} {say(orders, where)}"
        if where and sweep.gpus and not {gpu.uuid for gpu in sweep.gpus} - orders.gpus.keys():
            text += " No GPU is left to start on."
        if where and orders.queue != "run":
            still = "paused" if orders.queue == "pause" else "drained"
            text += f" All of it is {still} now: resume without --gpu ends that."
        click.echo(printable(text, limit=None))


def _options(function: Callable[..., None]) -> Callable[..., None]:
    for decorate in (
        click.option("--sweep", "sweep_id", metavar="ID", help="Which, where several run."),
        click.option(
            "--gpu",
            "gpus",
            metavar="GPU",
            multiple=True,
            help="NVML's number, 0:1 for a MIG instance, or the beginning of a UUID; may be "
            "given more than once. Default: the whole sweep.",
        ),
        click.argument("directory", default="outputs", type=click.Path()),
    ):
        function = decorate(function)
    return function


_SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"]}


@click.command(context_settings=_SETTINGS)
@_options
def pause(directory: str, gpus: tuple[str, ...], sweep_id: str | None) -> None:
    """Start no new run, on a GPU or at all, until resumed; what runs goes on.

    Means the sweep that runs on this machine with outputs in DIRECTORY (default: outputs).

    \b
    Examples:
      orchestrator-status pause
      orchestrator-status pause outputs/mlp --gpu 0 --gpu GPU-5c1e
      orchestrator-status pause --gpu 0:1 --sweep 20260101-120000-1a2b3c
    """  # noqa: D301 - click reads the backspace

    def say(_: Orders, where: str) -> str:
        goes_on = "what runs there goes on" if where else "what runs goes on"
        return f"starts no new run{where and f' on {where}'} until it is resumed; {goes_on}."

    _order(directory, gpus, sweep_id, lambda now, uuids: now.give("pause", uuids), say)


@click.command(context_settings=_SETTINGS)
@_options
def drain(directory: str, gpus: tuple[str, ...], sweep_id: str | None) -> None:
    """Let what runs end and start nothing new: to free a GPU, or to end the sweep in order.

    The sweep says when the last run on the GPU has ended. Without --gpu it ends as soon as
    what runs has ended, and the same command later runs what is missing. Means the sweep that
    runs on this machine with outputs in DIRECTORY (default: outputs).

    \b
    Examples:
      orchestrator-status drain --gpu 1
      orchestrator-status drain outputs/mlp
    """  # noqa: D301

    def say(_: Orders, where: str) -> str:
        if where:
            return f"starts no new run on {where} and says when the last there has ended."
        return "ends when what runs now has ended; the same command runs what is missing."

    _order(directory, gpus, sweep_id, lambda now, uuids: now.give("drain", uuids), say)


@click.command(context_settings=_SETTINGS)
@_options
def resume(directory: str, gpus: tuple[str, ...], sweep_id: str | None) -> None:
    """Take back what pause and drain have said: of a GPU or, without --gpu, all of it.

    Means the sweep that runs on this machine with outputs in DIRECTORY (default: outputs).

    \b
    Examples:
      orchestrator-status resume
      orchestrator-status resume outputs/mlp --gpu 1
    """  # noqa: D301

    def say(orders: Orders, where: str) -> str:
        if where and orders.queue != "run":
            return f"may use {where} again."
        return f"starts runs again{where and f' on {where}'}."

    _order(directory, gpus, sweep_id, lambda now, uuids: now.take_back(uuids), say)
