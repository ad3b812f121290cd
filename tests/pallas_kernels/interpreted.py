"""Interpreters of Hopper and TPU kernels, which run them on the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.experimental.pallas.tpu as pltpu
from jax._src import core, state
from jax._src.pallas.mosaic_gpu import core as gpu_core
from jax._src.pallas.mosaic_gpu import primitives as gpu_primitives
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks  # the race detector's results have no public name
from jax._src.pallas.mosaic_gpu.interpret import shared_memory as memory
from jax._src.pallas.mosaic_gpu.interpret.jaxpr_interpret import JaxprInterpreter
from jax._src.state import primitives as state_primitives
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pallas_kernels.hopper_launch import hopper_target


@contextlib.contextmanager
def interpreted_hopper(num_cores: int = 2) -> Iterator[plgpu.InterpretGPUParams]:
    """Yields the parameters that interpret a kernel and check every access to shared memory for races.

    It needs the settings of `tests/conftest.py` for callbacks: enough threads, and no asynchronous dispatch.

    Raises:
      RuntimeError: on leaving, when two accesses were not ordered by a barrier.
    """
    gpu_callbacks.reset_gpu_interpret_mode_state()
    try:
        with hopper_target(num_cores):
            yield plgpu.InterpretGPUParams(detect_races=True)
        if gpu_callbacks.get_races().races_found:
            raise RuntimeError("the kernel races: see the accesses printed above")
    finally:
        gpu_callbacks.reset_gpu_interpret_mode_state()


@contextlib.contextmanager
def interpreted_tpu() -> Iterator[pltpu.InterpretParams]:
    """Yields the parameters that interpret a kernel, and describes a TPU to the functions that choose kernels."""
    device = AbstractDevice(device_kind="TPU v6e", num_cores=1, platform="tpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        yield pltpu.InterpretParams()


_interpret, _interpret_wgmma = JaxprInterpreter.interpret, JaxprInterpreter._interpret_wgmma_ref_p


def _with_stores_to_accumulators(self, jaxpr, token, *args):
    """Interprets a jaxpr. jax 0.11 does not interpret a store to a wgmma accumulator: it becomes an ordinary one."""
    _, tree = jax.tree.flatten(())

    def as_swap(eqn):
        if eqn.primitive is not gpu_primitives.wgmma_accumulator_store_p:
            return eqn
        inner = eqn.invars[0].aval.inner_aval
        return eqn.replace(
            primitive=state_primitives.swap_p,
            params={"tree": tree},
            outvars=[core.DropVar(core.ShapedArray(inner.shape, inner.dtype))],
        )

    return _interpret(self, jaxpr.replace(eqns=[as_swap(eqn) for eqn in jaxpr.eqns]), token, *args)


def _wgmma_of_registers(self, eqn, token, get_invals):
    """Interprets a wgmma whose left operand is in registers, for which jax 0.11 has no rule: through a buffer."""
    if isinstance(eqn.invars[1].aval, state.AbstractRef):
        return _interpret_wgmma(self, eqn, token, get_invals)
    acc, a, *others = get_invals()
    where = {"mesh_location": self.mesh_location, "thread": self.thread}
    token, request = gpu_callbacks.call_make_allocation_request_array(
        token=token,
        compute_unit=self.thread,
        memory_space_id=memory.get_memory_space_idx(gpu_core.MemorySpace.REGS),
        initial_ref_count=1,
    )
    token, key = gpu_callbacks.call_allocate_buffer(token=token, allocation_request_as_array=request, value=a, **where)
    token, out = _interpret_wgmma(self, _with_reference(eqn, a), token, lambda: [acc, key, *others])
    token = gpu_callbacks.call_deallocate_buffer(token=token, allocation_key_as_array=key, **where)
    return token, out


def _with_reference(eqn, a):
    reference = core.Var(state.AbstractRef(core.ShapedArray(a.shape, a.dtype), gpu_core.MemorySpace.REGS))
    return eqn.replace(invars=[eqn.invars[0], reference, *eqn.invars[2:]])


JaxprInterpreter.interpret = _with_stores_to_accumulators
JaxprInterpreter._interpret_wgmma_ref_p = _wgmma_of_registers
