"""Pipeline parallelism (report section 3.2.1): schedules, slots, executor, stages and their weights."""
