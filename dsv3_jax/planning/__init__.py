"""Calculates what a run needs before it is started, and asks the compiler: memory, traffic, time and cost."""
