"""What a run needs before it is started: memory, traffic, time and cost, on paper and from the compiler itself."""
