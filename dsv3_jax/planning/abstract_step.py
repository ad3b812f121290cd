"""Traces the real training step with shapes for arrays, for the devices of a mesh that need not exist."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from dsv3_jax.model import DeepSeekV3
from dsv3_jax.modules.devices import OneDevice
from dsv3_jax.pipeline.slots import moe_layers_of_stages
from dsv3_jax.planning.config import PlanConfig
from dsv3_jax.sharding.mesh import make_mesh
from dsv3_jax.sharding.rules import batch_spec
from dsv3_jax.training.state import Skeleton, new_state
from dsv3_jax.training.state_layout import StateLayout
from dsv3_jax.training.step import StepSettings, make_train_step


def traced_step(config: PlanConfig, devices: Sequence[Any]) -> Any:
    """Returns `make_train_step`'s step traced for these devices, ready to be lowered."""
    mesh, run = make_mesh(config.mesh, devices), config.run
    layers = moe_layers_of_stages(config.model, config.mesh.stage)
    layout = StateLayout(mesh, config.zero, run.training.overlap_exchange, layers)

    def make() -> DeepSeekV3:
        devices = layout.devices if config.target.devices > 1 else OneDevice()
        return DeepSeekV3(
            config.model,
            rngs=nnx.Rngs(0),
            precision=config.recipe,
            devices=devices,
            remat=run.training.rematerialisation,
            attention=run.training.attention,
        )

    graph, _, rest = nnx.split(nnx.eval_shape(make), nnx.Param, ...)
    # Router biases are the only other variables; every step overwrites them.
    skeleton = Skeleton(graph, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), rest))
    state = jax.eval_shape(lambda: new_state(make(), run)[1])
    state = jax.tree.map(_with_sharding, state, layout.of_state(state))
    shape = (config.passes, config.sequences_per_pass, config.sequence_length + 1)
    batch = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, batch_spec(leading=1)))
    scalar: Any = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    settings = StepSettings(scalar, scalar, scalar, scalar)
    return make_train_step(skeleton, run, layout).trace(state, batch, batch, settings)


def _with_sharding(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
