"""Checks Muon against the published algorithm in float64, matrix by matrix."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import small_model
from small_runs import small_run

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import ConfigError
from dsv3_jax.model import abstract_model
from dsv3_jax.training.config import LoraConfig
from dsv3_jax.training.muon import hidden_matrices, orthogonalise
from dsv3_jax.training.optimizer import make_optimizer

RUN = small_run(optimizer="muon", muon_momentum=0.9, weight_decay=0.1, gradient_clip=1e30)
STACKED = {"gate_up.weight": 1, "experts.gate_up": 2, "experts.down": 1}  # axes before a matrix, without that of layers
COLUMN_AXES = {"o.weight": 2}  # its inputs are heads and their widths
OF_ADAMW = ("embedding.weight", "head.weight", "norm.weight")


def flat(tree: Any) -> dict[str, np.ndarray]:
    leaves = nnx.to_flat_state(tree)
    return {".".join(map(str, path)): np.asarray(leaf.get_value(), np.float64) for path, leaf in leaves}


def newton_schulz(g: np.ndarray) -> np.ndarray:
    """Five iterations of one matrix in float64, as Jordan (2024) writes them."""
    x = g.T if g.shape[0] > g.shape[1] else g
    x = x / (np.linalg.norm(x) + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if g.shape[0] > g.shape[1] else x


def update_of(name: str, direction: np.ndarray) -> np.ndarray:
    """Returns 0.2 sqrt(max(rows, columns)) times the orthogonalised matrices of one parameter, one after the other."""
    key = next((key for key in STACKED if name.endswith(key)), "")
    axes = STACKED.get(key, 0) + name.startswith(("dense_blocks", "moe_blocks"))
    columns = next((count for key, count in COLUMN_AXES.items() if name.endswith(key)), 1)
    result = np.empty_like(direction)
    for index in np.ndindex(*direction.shape[:axes]):
        part = direction[index]
        rows = int(np.prod(part.shape[: part.ndim - columns]))
        matrix = part.reshape(rows, -1)
        result[index] = (0.2 * np.sqrt(max(matrix.shape)) * newton_schulz(matrix)).reshape(part.shape)
    return result


@pytest.mark.parametrize(("moment_dtype", "query_rank"), [("float32", 12), ("bfloat16", None)])
def test_updates_are_those_of_the_published_algorithm(moment_dtype: str, query_rank: int | None) -> None:
    """Every matrix of every layer, expert, gate and up is orthogonalised alone; AdamW has the rest.

    An iteration multiplies an error of a small singular value by up to 3.4445, five of them by 485: of float32's 6e-8
    that leaves 3e-5 of a singular value of 1.
    """
    model = RUN.model.replace(q_lora_rank=query_rank)
    optimizer = make_optimizer(RUN.training, moment_dtype, model)
    adamw = make_optimizer(dataclasses.replace(RUN.training, optimizer="adamw"), moment_dtype, model)
    params = nnx.state(small_model(model, 0), nnx.Param)
    state, adam_state = optimizer.init(params), adamw.init(params)
    momentum = {name: np.zeros_like(value) for name, value in flat(params).items()}
    step, adam_step = jax.jit(optimizer.update), jax.jit(adamw.update)
    for count in range(2):
        gradients = nnx.state(small_model(model, 10 + count), nnx.Param)
        updates, state = step(gradients, state, params)
        by_adamw, adam_state = adam_step(gradients, adam_state, params)
        found, weights, theirs = flat(updates), flat(params), flat(by_adamw)
        stored = flat(state[1].momentum)
        assert not any(name.endswith(OF_ADAMW) for name in stored)
        for name, g in flat(gradients).items():
            if name.endswith(OF_ADAMW):
                np.testing.assert_array_equal(found[name], theirs[name])
                continue
            new = 0.9 * momentum[name] + g
            wanted = update_of(name, g + 0.9 * new)
            got = found[name] - 0.1 * weights[name]
            largest = 0.2 * np.sqrt(max(wanted.shape[-2:]))
            np.testing.assert_allclose(got, wanted, atol=1e-4 * max(largest, 1), err_msg=name)
            eps = float(jnp.finfo(moment_dtype).eps)
            np.testing.assert_allclose(stored[name], new, rtol=eps, atol=1e-6 * np.abs(new).max())
            momentum[name] = stored[name]


@pytest.mark.parametrize("shape", [(8, 8), (5, 64), (64, 5), (1, 7), (2, 3, 6, 4)])
def test_singular_values_are_near_one(shape: tuple[int, ...]) -> None:
    """Also those of matrices of a size of 1e-6; a matrix of zeros, which an expert without tokens has, stays zero."""
    random = np.random.default_rng(0)
    u, _, vt = np.linalg.svd(random.normal(size=shape), full_matrices=False)
    sizes = random.uniform(0.1, 1.0, u.shape[-1])
    found = orthogonalise(jnp.asarray(1e-4 * (u * sizes) @ vt, jnp.float32))
    values = np.linalg.svd(np.asarray(found, np.float64), compute_uv=False)
    assert values.min() > 0.6
    assert values.max() < 1.3
    np.testing.assert_array_equal(orthogonalise(jnp.zeros(shape)), np.zeros(shape))


def test_adapters_are_trained_by_adamw_only() -> None:
    training = dataclasses.replace(RUN.training, ema_decay=0.0)
    with pytest.raises(ConfigError, match=r"needs training\.optimizer adamw"):
        dataclasses.replace(RUN, training=training, lora=LoraConfig(rank=2))


@pytest.mark.parametrize("preset", ["tiny", "moonlight-16b"])
def test_the_hidden_matrices_are_all_that_adamw_does_not_have(preset: str) -> None:
    """Also without query compression."""
    model = ModelConfig.preset(preset)
    leaves = nnx.to_flat_state(nnx.state(abstract_model(model), nnx.Param))
    shapes = {".".join(map(str, path)): leaf.shape for path, leaf in leaves}
    matrices = hidden_matrices(model)
    assert set(matrices) == {name for name in shapes if not name.endswith(OF_ADAMW)}
    for name, (axes, rows, columns) in matrices.items():
        assert int(np.prod(shapes[name][axes:])) == rows * columns
