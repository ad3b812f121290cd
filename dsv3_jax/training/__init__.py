"""Pre-training (report section 4): schedules, step, loop, checkpoints, metrics."""
