"""What a run needs, before it is started: memory, traffic, time and cost, calculated and as the compiler says."""
