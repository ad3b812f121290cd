"""Settings of all tests: one CPU device, compiled programs kept between test runs, and the order of the files."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import simulated

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling takes most of the suite's time. LLVM's optimisations took two fifths of that, and XLA's newer emitters of
# fused operations two thirds of the rest. Processes that tests start inherit these settings, so that their runs can be
# compared bit for bit; processes that compile for other hardware must not inherit them.
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
# Interpreted kernels call back into Python, which computes with JAX. With asynchronous dispatch both would wait forever
# once the queue of programs is full.
jax.config.update("jax_cpu_enable_async_dispatch", False)
jax.config.update("jax_compilation_cache_dir", str(_ROOT / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

# A loop over the layers compiles faster than unrolled layers. `test_model.py` compares the two.
model.MOST_UNROLLED_LAYERS = 1

# Tracing makes many small objects that stay alive; searching all of them for garbage took a fifth of its time.
gc.set_threshold(100_000, 50, 100)

# Each file runs on one worker, so that its fixtures are made once; these start first, so that no long file comes last.
_LONGEST = (
    "test_compile_ahead",
    "test_compiled",
    "test_notebooks",
    "test_resume",
    "test_two_processes",
    "test_model",
    "test_mesh_axes_together",
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
