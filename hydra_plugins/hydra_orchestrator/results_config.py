"""``hydra/callbacks=results`` and ``hydra/output=named``, for any Hydra app.

Imported at each start of every Hydra app: keep it light.
"""

from __future__ import annotations

from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from hydra_plugins.hydra_orchestrator._store import store_later
from orchestrator.resolvers import RUN_NAME_RESOLVER


def _run_name(below: str, *, _root_: Any) -> str:
    from orchestrator.identity import name_in_config

    return name_in_config(below, _root_=_root_)


OmegaConf.register_new_resolver(RUN_NAME_RESOLVER, _run_name, replace=True)

# Hydra keeps callbacks in a mapping by name.
store_later("hydra/callbacks", "results", "orchestrator.settings:ResultsSettings", "results")
ConfigStore.instance().store(
    group="hydra/output",
    name="named",
    package="hydra",
    node={
        "run": {"dir": "${hydra.sweep.dir}/${orchestrator.run_name:sweep.dir}"},
        "sweep": {"dir": "outputs", "subdir": "${orchestrator.run_name:sweep.dir}"},
    },
    provider="orchestrator",
)
