"""Meshes, axis rules, expert and pipeline parallelism (report section 3.2)."""
