"""``hydra.launcher.dry_run``: what would be submitted, and what it would cost."""
