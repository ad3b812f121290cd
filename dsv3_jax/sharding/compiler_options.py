"""The options with which XLA compiles a training step, so that it runs communication beside computation."""

from __future__ import annotations

from jax.sharding import Mesh

ON_GPUS: dict[str, bool | int] = {
    # Orders instructions so that much stands between the start and the done of a collective. It is off by default.
    "xla_gpu_enable_latency_hiding_scheduler": True,
    # The exchange of tokens has up to twelve sends in an iteration, which do not depend on each other
    # (`expert_stages`). By default the next one is started only when the one before is done.
    "xla_gpu_experimental_parallel_collective_overlap_limit": 16,
    # The scheduler takes kernels that it does not know, as all of Pallas are, for short ones. It would start sends
    # behind most of an iteration's products.
    "xla_gpu_experimental_collective_start_as_early_as_possible": True,
    # In percent. Where a step needs more than this part of four fifths of the memory, the scheduler gives up overlap
    # until it does not. By default that is 95, three quarters of the memory; this is nine tenths.
    "xla_gpu_memory_limit_slop_factor": 115,
}
"""Options of NVIDIA GPUs, each with its reason."""


def compiler_options(mesh: Mesh | None) -> dict[str, bool | int] | None:
    """Returns the options for a step on a mesh; None where the compiler's own are used."""
    if mesh is None or mesh.size == 1 or mesh.devices.flat[0].platform not in ("gpu", "cuda"):
        return None
    return dict(ON_GPUS)
