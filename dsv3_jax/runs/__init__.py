"""Runs from start to end: folder, training loop, checkpoints, interruption, metrics, plots and processes."""
