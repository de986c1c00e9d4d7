"""Training with many workers in one process, without a ring."""
