"""The real training step with shapes for arrays: state and batch laid out on a mesh of devices that need not exist."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from dsv3_jax.data import DataConfig
from dsv3_jax.model import DeepSeekV3
from dsv3_jax.planning.config import PlanConfig
from dsv3_jax.precision import Precision
from dsv3_jax.sharding.expert_parallel import distribute_experts
from dsv3_jax.sharding.mesh import make_mesh
from dsv3_jax.sharding.rules import ZERO, batch_spec, shardings
from dsv3_jax.training.config import RunConfig, TrainingConfig
from dsv3_jax.training.state import Skeleton, new_state
from dsv3_jax.training.step import StepSettings, make_train_step


def run_of(config: PlanConfig) -> RunConfig:
    """The training run that a plan is of."""
    return RunConfig(
        preset="",
        model=config.model,
        data=DataConfig(sequence_length=config.sequence_length, vocab_size=config.model.vocab_size),
        training=TrainingConfig(
            batch_size=config.batch_size,
            micro_batch_size=config.batch_size // config.passes,
            rematerialisation=config.rematerialisation,
            # One piece: pieces are cut from the whole batch, across the ranks that have its parts.
            loss_chunk=config.tokens_a_step // config.passes,
            moment_dtype=config.moment_dtype,  # pyright: ignore[reportArgumentType]
            ema_decay=0.99 if config.average == "device" else 0.0,
        ),
        precision=config.precision,
    )


def traced_step(config: PlanConfig, devices: Sequence[Any]) -> Any:
    """`make_train_step`'s step traced for these devices, ready to be lowered."""
    mesh = make_mesh(config.mesh, devices)
    run = run_of(config)

    def make() -> DeepSeekV3:
        precision = Precision.preset(run.precision)
        remat = run.training.rematerialisation
        model = DeepSeekV3(config.model, rngs=nnx.Rngs(0), precision=precision, remat=remat)
        if config.target.devices > 1:
            distribute_experts(model, mesh)
        return model

    graph, _, rest = nnx.split(nnx.eval_shape(make), nnx.Param, ...)
    # Router biases, the only other variables, are written anew in every step.
    skeleton = Skeleton(graph, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), rest))
    state = jax.eval_shape(lambda: new_state(make(), run)[1])
    places = shardings(state, mesh)
    if config.zero:
        places = dataclasses.replace(places, optimizer=shardings(state.optimizer, mesh, ZERO))
    state = jax.tree.map(_laid_out, state, places)
    shape = (config.passes, config.batch_size // config.passes, config.sequence_length + 1)
    batch = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, batch_spec(leading=1)))
    scalar: Any = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    return make_train_step(skeleton, run).trace(state, batch, batch, StepSettings(scalar, scalar, scalar, scalar))


def _laid_out(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
