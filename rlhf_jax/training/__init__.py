"""Training state, checkpoints, metrics and the report of a run."""
