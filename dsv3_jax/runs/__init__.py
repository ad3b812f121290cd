"""A run's life: its folder, loop, checkpoints, interruption, metrics, plots and processes."""
