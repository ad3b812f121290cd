"""Muon: momentum whose matrices are orthogonalised, and AdamW for all other parameters.

    M_t = mu M_{t-1} + G_t
    O_t = NewtonSchulz(G_t + mu M_t)
    W_t = W_{t-1} - eta (0.2 sqrt(max(rows, columns)) O_t + lambda W_{t-1})

The orthogonalisation is Jordan's (2024, "Muon: an optimizer for hidden layers in neural networks"), with momentum in
Nesterov's form. The factor of the update and the weight decay are those of Liu et al. (2025, arXiv:2502.16982, "Muon
is scalable for LLM training", Eq. 4): an update of Muon then has about the size of one of AdamW, so that both take the
same learning rate. As there, embedding, output head and the gains of norms are left to AdamW; routers are matrices
like the others.

optax has Muon too, but it flattens the axes of layers and experts into one, for which a mesh would have to gather all
experts. Here a stack keeps its axes, so that every device orthogonalises the experts that it holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from dsv3_jax.config import ModelConfig
from dsv3_jax.interop.tensor_names import EMBEDDING, HEAD, published_tensors

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Each iteration multiplies X, X X^T X and (X X^T)^2 X by these and adds them (Keller Jordan's coefficients)."""
ITERATIONS = 5
UPDATE_SIZE = 0.2  # root mean square of AdamW's updates in practice (Liu et al., section 2.2)
_SMALLEST_NORM = 1e-7  # added to a matrix's norm

Tree = Any
"""A pytree of arrays."""


class MuonState(NamedTuple):
    """State of the optimizer.

    Attributes:
      momentum: M of every hidden matrix.
      adam: state of Adam for the other parameters.
    """

    momentum: nnx.State
    adam: optax.OptState


def hidden_matrices(model: ModelConfig) -> dict[str, tuple[int, int, int]]:
    """Returns, by path of each parameter that Muon updates, its leading axes of stacked matrices, rows and columns.

    A stack has axes of layers, experts, gate and up. The matrices are the published ones but for embedding and head.
    """
    tensors = (tensor for tensor in published_tensors(model) if len(tensor.shape) == 2)
    return {
        tensor.path: (len(tensor.index), tensor.shape[0], tensor.shape[1])
        for tensor in tensors
        if tensor.path not in (EMBEDDING, HEAD)
    }


def scale_by_muon(
    adam: optax.GradientTransformation, model: ModelConfig, momentum: float, dtype: jnp.dtype
) -> optax.GradientTransformation:
    """Returns Muon for the hidden matrices of an `nnx.State` of parameters, and `adam` for the others.

    Args:
      momentum: mu.
      dtype: dtype in which M is stored; the update is computed in float32.
    """
    matrices = hidden_matrices(model)

    def split(tree: Tree) -> tuple[nnx.State, nnx.State]:
        hidden, others = nnx.split_state(tree, lambda path, _: parameter_name(path) in matrices, ...)
        return hidden, others

    def init(params: Tree) -> MuonState:
        hidden, others = split(params)
        return MuonState(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, dtype), hidden), adam.init(others))

    def update(updates: Tree, state: Any, params: Tree = None) -> tuple[Tree, MuonState]:
        hidden, others = split(updates)
        new = jax.tree.map(lambda m, g: momentum * m.astype(jnp.float32) + g, state.momentum, hidden)
        looking_ahead = jax.tree.map(lambda m, g: g + momentum * m, new, hidden)
        orthogonal = nnx.from_flat_state(
            [
                (path, variable.replace(_update(variable.get_value(), *matrices[parameter_name(path)])))
                for path, variable in nnx.to_flat_state(looking_ahead)
            ]
        )
        rest: Any
        rest, adam_state = adam.update(others, state.adam, None if params is None else split(params)[1])
        stored = jax.tree.map(lambda leaf: leaf.astype(dtype), new)
        return nnx.merge_state(orthogonal, rest), MuonState(stored, adam_state)

    return optax.GradientTransformation(init, update)


def orthogonalise(x: Float[Array, "*stack rows columns"]) -> Float[Array, "*stack rows columns"]:
    """Returns about U V^T of every matrix U S V^T, by Newton-Schulz: its singular values are near 1 (0.7 to 1.2).

    The products have the device's default precision for the dtype of `x`. Each multiplies the smaller of X X^T and
    X^T X, whose sums over a sharded axis are small next to the matrix.
    """
    a, b, c = COEFFICIENTS
    x = x / (jnp.sqrt(jnp.sum(jnp.square(x), axis=(-2, -1), keepdims=True)) + _SMALLEST_NORM)
    wide = x.shape[-2] <= x.shape[-1]
    for _ in range(ITERATIONS):
        gram = x @ x.mT if wide else x.mT @ x
        factor = b * gram + c * gram @ gram
        x = a * x + (factor @ x if wide else x @ factor)
    return x


def _update(gradient: Float[Array, "..."], stacked_axes: int, rows: int, columns: int) -> Float[Array, "..."]:
    """Returns the update of a parameter, before learning rate and weight decay, in the parameter's own shape."""
    matrices = gradient.reshape(*gradient.shape[:stacked_axes], rows, columns)
    return (UPDATE_SIZE * max(rows, columns) ** 0.5 * orthogonalise(matrices)).reshape(gradient.shape)


def parameter_name(path: Sequence[Any]) -> str:
    """Returns the dotted name of a parameter from its path in an `nnx.State`."""
    return ".".join(map(str, path))
