"""Distillation on logits: the divergence of a student's distribution of the next token from a teacher's.

    D = sum_{v in K} p_v log(p_v / q_v) + P log(P / Q),    P = 1 - sum_K p,    Q = 1 - sum_K q

p is the teacher's distribution, q the student's, and K the tokens that the teacher finds most likely. All others are
one outcome with the probabilities P and Q. D is zero only where the student agrees about K, it is at most the
divergence of the whole distributions, and equal to it where K is the whole vocabulary. Renormalising the teacher over K
instead would teach the student that nothing outside K is ever said, and renormalising both would not teach it how much
is.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from dsv3_jax.model import DeepSeekV3
from dsv3_jax.training.losses import in_pieces
from dsv3_jax.training.state import Skeleton

_NEVER = -1e30  # a logarithm whose exponential is zero, and whose gradient is a number


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A model that no step changes.

    Attributes:
      skeleton: the model without its parameters.
      params, biases: its parameters and router biases, sharded over the run's devices.
    """

    skeleton: Skeleton
    params: nnx.State
    biases: Float[Array, "layers E"]


def divergence(student: Float[Array, "*N V"], teacher: Float[Array, "*N V"], top_k: int) -> Float[Array, "*N"]:
    """Returns D in nats.

    Args:
      student, teacher: logits.
      top_k: how many tokens of the teacher are told apart, and as many more as are as likely as the last of them; 0 for
        the whole vocabulary.
    """
    p, q = (jax.nn.log_softmax(logits, axis=-1) for logits in (teacher, student))
    terms = jnp.exp(p) * (p - q)
    if not 0 < top_k < p.shape[-1]:
        return jnp.sum(terms, axis=-1)
    kept = p >= lax.top_k(p, top_k)[0][..., -1:]
    rest_p, rest_q = (jax.nn.logsumexp(jnp.where(kept, _NEVER, x), axis=-1) for x in (p, q))
    return jnp.sum(jnp.where(kept, terms, 0.0), axis=-1) + jnp.exp(rest_p) * (rest_p - rest_q)


def divergences(
    student: DeepSeekV3,
    teacher: DeepSeekV3,
    hidden: Float[Array, "B T d"],
    teachers_hidden: Float[Array, "B T d2"],
    *,
    top_k: int,
    chunk: int,
) -> Float[Array, "B T"]:
    """Returns D of every position, computing the logits of about `chunk` tokens at a time.

    Args:
      hidden, teachers_hidden: hidden states before the output heads.
    """
    width = hidden.shape[-1]

    def of(both: Float[Array, "*N d"], _: Array) -> Float[Array, "*N"]:
        logits = lax.stop_gradient(teacher.head(both[..., width:]))
        return divergence(student.head(both[..., :width]), logits, top_k)

    both = jnp.concatenate([hidden, lax.stop_gradient(teachers_hidden)], axis=-1)
    return in_pieces(of, both, jnp.zeros(hidden.shape[:2], jnp.int32), chunk, student.devices.context_ranks)
