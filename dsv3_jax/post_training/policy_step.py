"""One optimizer step of GRPO, and the log-probabilities that it compares, as pure functions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.errors import ConfigError
from dsv3_jax.model import DeepSeekV3
from dsv3_jax.post_training.grpo import Completions, GRPOConfig, GRPOTerms, grpo_terms
from dsv3_jax.training.config import RunConfig
from dsv3_jax.training.losses import cross_entropy, in_pieces
from dsv3_jax.training.optimizer import make_optimizer
from dsv3_jax.training.qk_clip import LargestLogits
from dsv3_jax.training.state import Skeleton, TrainState, split_trained
from dsv3_jax.training.state_layout import StateLayout
from dsv3_jax.training.step import accumulate, updated


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PolicyState(TrainState):
    """A train state with the reference that the policy is held close to.

    Attributes:
      reference: parameters of the reference model, whose router biases are those of the policy; None without one.
    """

    reference: nnx.State | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Texts:
    """Prompts with their completions, padded on the right; every array has a first axis of passes A.

    Attributes:
      tokens: int32 ids.
      lengths: int32, number of tokens that are not padding; 0 in a row that only fills up the pass.
      experts: the experts that the engine chose for each of the first T tokens in the MoE layers of the main model,
        rows first; None where the trainer's routers choose.
    """

    tokens: Int[Array, "A N T1"]
    lengths: Int[Array, "A N"]
    experts: Int[Array, "A N T layers K"] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PolicyMetrics:
    """The metrics of one optimizer step.

    Attributes:
      terms: the objective and its parts.
      entropy: mean over the drawn tokens of the entropy of the policy's distribution, in nats.
      gradient_norm: norm of the whole gradient before clipping.
      applied: whether the step was applied, which it is if loss and gradient are finite.
      nonfinite_steps: how many steps in a row, this one included, were not applied.
      largest_logit: the largest attention logit of all heads before the update; None where not measured.
    """

    terms: GRPOTerms
    entropy: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    applied: Bool[Array, ""]
    nonfinite_steps: Int[Array, ""]
    largest_logit: Float[Array, ""] | None


_Measured = tuple[GRPOTerms, Float[Array, ""], LargestLogits | None]


def log_probs_and_entropies(
    model: DeepSeekV3, texts: Texts, chunk: int, *, measure_logits: bool = False
) -> tuple[Float[Array, "N T"], Float[Array, "N T"], LargestLogits | None]:
    """Returns the log-probability of each token after the first, the entropy (nats) it was drawn with, and logits.

    Args:
      texts: one pass, without the axis of passes.
      chunk: about how many tokens' logits are held at a time.
      measure_logits: whether the largest attention logits are returned too; None unless they are.
    """
    inside = jnp.arange(texts.tokens.shape[1] - 1) < texts.lengths[:, None]
    experts = None if texts.experts is None else jnp.moveaxis(texts.experts.astype(jnp.int32), 2, 0)
    features = model.features(
        texts.tokens[:, :-1],
        segment_ids=inside.astype(jnp.int32),
        isolate_segments=False,
        experts=experts,
        measure_logits=measure_logits,
    )
    largest = features.largest_logits  # those of the MTP modules, which stay as they are, are left out
    largest = None if largest is None else LargestLogits(largest[: model.config.num_hidden_layers])

    def of(hidden: Float[Array, "*M d"], targets: Int[Array, "*M"]) -> tuple[Float[Array, "*M"], Float[Array, "*M"]]:
        logits = model.head(hidden)
        logs = jax.nn.log_softmax(jax.lax.stop_gradient(logits), axis=-1)
        losses: Array = cross_entropy(logits, targets)
        return -losses, -jnp.sum(jnp.exp(logs) * logs, axis=-1)

    parts = model.devices.context_ranks
    return *in_pieces(of, features.hidden, texts.tokens[:, 1:], chunk, parts), largest


def make_log_probs(
    skeleton: Skeleton, config: RunConfig, layout: StateLayout
) -> Callable[[nnx.State, Float[Array, "layers E"], Texts], Float[Array, "A N T"]]:
    """Returns the jitted function (params, router biases, texts) -> log-probability of each token after the first."""
    chunk = config.training.loss_chunk * layout.token_ranks

    @jax.jit
    def log_probs(params: nnx.State, biases: Float[Array, "layers E"], texts: Texts) -> Float[Array, "A N T"]:
        model = skeleton.model(params, biases)
        return layout.replicate(jax.lax.map(lambda one: log_probs_and_entropies(model, one, chunk)[0], texts))

    return log_probs


def make_policy_step(
    skeleton: Skeleton,
    config: RunConfig,
    objective: GRPOConfig,
    *,
    longest: int,
    layout: StateLayout | None = None,
    donate: bool = True,
) -> Callable[[PolicyState, Texts, Completions, Float[Array, ""]], tuple[PolicyState, PolicyMetrics]]:
    """Returns the jitted step: (state, texts, completions, learning rate) -> (state, metrics).

    The gradients of the A passes are accumulated in float32. If the loss or the gradient is not finite, nothing is
    applied. Router biases and MTP modules stay as they are.

    Args:
      objective: the objective, of which every pass is a part.
      longest: the most tokens that a completion may have.
      layout: the sharding of the state and of the batch; one device unless given.
      donate: whether the old state is overwritten, and not readable any more.

    Raises:
      ConfigError: the layout has pipeline stages.
    """
    layout = layout or StateLayout()
    if layout.stages > 1:
        raise ConfigError("reinforcement learning has no pipeline: give a mesh without mesh.stage")
    chunk = config.training.loss_chunk * layout.token_ranks
    optimizer = make_optimizer(config.training, config.moment_dtype, config.model)

    def step(
        state: PolicyState, texts: Texts, completions: Completions, learning_rate: Float[Array, ""]
    ) -> tuple[PolicyState, PolicyMetrics]:
        counts = {
            "batch_completions": jnp.maximum(jnp.sum(texts.lengths > 0), 1).astype(jnp.float32),
            "batch_tokens": jnp.maximum(jnp.sum(completions.mask), 1).astype(jnp.float32),
        }

        def loss_of(
            trained: nnx.State, kept: nnx.State, texts: Texts, completions: Completions
        ) -> tuple[Float[Array, ""], _Measured]:
            model = skeleton.model(nnx.merge_state(trained, kept), state.router_biases)
            measured = log_probs_and_entropies(model, texts, chunk, measure_logits=bool(config.training.qk_clip))
            log_probs, entropies, largest = measured
            terms = grpo_terms(log_probs, completions, objective, longest=longest, **counts)
            entropy = jnp.sum(entropies * completions.mask) / counts["batch_tokens"]
            return terms.loss, (terms, entropy, largest)

        def one_pass(texts: Texts, completions: Completions) -> tuple[nnx.State, _Measured]:
            return jax.grad(loss_of, has_aux=True)(*split_trained(state.params), texts, completions)

        gradients, (terms, entropy, largest) = accumulate(one_pass, texts, completions)
        gradients = layout.constrain_gradients(gradients)
        norm = optax.global_norm(gradients)
        finite = jnp.isfinite(terms.loss) & jnp.isfinite(norm)
        new = updated(state, gradients, state.router_biases, finite, learning_rate, optimizer, config, largest)
        largest = None if largest is None else jnp.max(largest.values)
        metrics = PolicyMetrics(terms, entropy, norm, finite, new.nonfinite_steps, largest)
        return layout.constrain_state(new), layout.replicate(metrics)

    return jax.jit(step, donate_argnums=0 if donate else ())
