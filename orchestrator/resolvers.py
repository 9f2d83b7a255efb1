"""Names of the resolvers that configs may use."""

from __future__ import annotations

# ${orchestrator.run_name:sweep.dir} in a config is the name of the run's directory.
RUN_NAME_RESOLVER = "orchestrator.run_name"
