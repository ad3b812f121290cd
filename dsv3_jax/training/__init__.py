"""The numerics of training (report section 4): losses, optimizer, schedules, train state, and the step."""
