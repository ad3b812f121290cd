"""A sample of text from the trained model, written at the end of a run."""

from __future__ import annotations

import jax

from dsv3_jax.data import Data
from dsv3_jax.inference import Sampler, complete
from dsv3_jax.model import DeepSeekV3
from dsv3_jax.runs.checkpoints import abstract_state, make_model
from dsv3_jax.training.config import RunConfig
from dsv3_jax.training.state import Skeleton, TrainState
from dsv3_jax.training.state_layout import StateLayout

_LARGEST_GATHERED = 4e9  # parameters; a larger model is not gathered on one device


def whole_model(skeleton: Skeleton, state: TrainState, config: RunConfig, layout: StateLayout) -> DeepSeekV3 | None:
    """Gathers the model on one device. All processes must call this together.

    Returns:
      The model, with the running average of the weights if the run keeps one; None where it has more than 4 billion
      parameters and is spread over several devices.
    """
    params = state.weights(config.lora)
    if layout.mesh is None:
        return skeleton.model(params, state.router_biases)
    if config.model.num_parameters(mtp=True) > _LARGEST_GATHERED:
        return None
    whole = layout.on_one_device((params, state.router_biases))
    plain, _ = abstract_state(config, lambda: make_model(config))
    return plain.model(*whole)


def sample_text(model: DeepSeekV3, data: Data, config: RunConfig) -> str:
    """Returns a prompt from the validation set, then `|`, then the model's continuation, as text.

    The prompt is the first 24 tokens of a text; of a sample with a prompt of its own, that.
    """
    tokens, segment_ids = data.validation_rows()
    first = tokens[0][abs(segment_ids[0]) == abs(segment_ids[0][0])]
    read_only = int((segment_ids[0] < 0).argmin())  # 0 if the first token is a target
    prompt = first[: min(read_only or 24, config.model.max_position_embeddings - 1)].tolist()
    space = config.model.max_position_embeddings - len(prompt)
    new = complete(
        model,
        [prompt],
        min(config.training.sample_tokens, space),
        Sampler(temperature=0.7, top_p=0.95),
        jax.random.key(config.training.seed),
        stop_token=data.tokenizer.eos_id,
    )
    return f"{data.tokenizer.decode(prompt)}|{data.tokenizer.decode(new[0])}\n"
