"""Shared by all tests: one CPU device, compiled programs kept between runs, errors of the user told from ours."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import simulated

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is most of the suite's time: LLVM's optimisations were two fifths of that, and of the rest the newer way to
# write down fused operations, a compiler of its own for each, two thirds. Processes that tests start inherit this, so
# that runs can be compared bit for bit; those that compile for other hardware must not.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("XLA_FLAGS", simulated.QUICK_TO_COMPILE)
# An interpreted Hopper kernel runs one program per warpgroup of a cluster, all at the same time, and they wait for one
# another in callbacks. XLA runs parts of programs in a pool of threads, one per core: when callbacks block all of them,
# the program that would release them cannot go on. Clusters here have at most 6 warpgroups.
os.environ.setdefault("PJRT_NPROC", "16")

import jax
import pytest

from dsv3_jax import model

_ROOT = Path(__file__).resolve().parent.parent
# Interpreted kernels call back into Python, which computes with JAX: behind a queue of programs that is full both would
# wait for ever.
jax.config.update("jax_cpu_enable_async_dispatch", False)
jax.config.update("jax_compilation_cache_dir", str(_ROOT / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

# For the same reason. `test_model.py` compares the loop over the layers with layers laid out whole.
model.MOST_UNROLLED_LAYERS = 1

# Tracing makes many small objects that live, and looking through all of them for garbage was a fifth of its time.
gc.set_threshold(100_000, 50, 100)

# Files are dealt to the workers whole (their fixtures are made once), in this order, so that no long one comes last.
_LONGEST = (
    "test_compile_ahead",
    "test_compiled",
    "test_known_traps",
    "test_notebooks",
    "test_resume",
    "test_two_processes",
    "test_model",
    "test_mesh_axes_in_pairs",
    "test_mesh_axes_with_stages",
    "test_grouped_matmul_kernels",
    "test_expert_parallel",
    "test_routing_kernels",
    "test_mesh_axes_alone",
    "test_golden",
    "test_generate",
    "test_pipeline_executor",
    "test_load_hf",
    "test_train_command",
    "test_speculative",
    "test_whole_experiment",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _LONGEST.index(item.path.stem) if item.path.stem in _LONGEST else len(_LONGEST))
