"""Meshes, axis rules, expert parallelism and the placement of experts (report sections 3.2 and 3.4)."""
