"""The two compiled programs of the engine: one reads chunks of prompts, one writes tokens for running requests.

Both read and write the pages. The second runs several steps before it returns to the host; rows that end in between
wait as padding. With drafts, a step is: draft tokens with the MTP module, check them all in one pass of the main model,
keep those that `check_draft` accepts. One more token than accepted drafts is written.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.inference.sampling import SamplerRows, TextSoFar, adjust, choose
from dsv3_jax.inference.scores import Scores
from dsv3_jax.inference.speculation import DRAFT, TOKEN, check_draft
from dsv3_jax.micro_batches import decode_in_two
from dsv3_jax.model import DeepSeekV3
from dsv3_jax.modules.paged_cache import PagedCache, Pages


class ModelGraph:
    """What `nnx.split` returns of a model besides its weights, a constant of the programs.

    Every call of a program looks the constant up. Its hash, which takes as long as a step of a small model, is computed
    once.
    """

    def __init__(self, graph: nnx.GraphDef[DeepSeekV3]):
        self._graph = graph
        self._hash = hash(graph)

    @classmethod
    def split(cls, model: DeepSeekV3) -> tuple[ModelGraph, nnx.State]:
        """Returns the structure and the weights of a model."""
        graph, weights = nnx.split(model)
        return cls(graph), weights

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, ModelGraph) and self._graph == other._graph)

    def model(self, weights: nnx.State) -> DeepSeekV3:
        """Returns the model with these weights."""
        return nnx.merge(self._graph, weights)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """What stays on the device for each of the engine's S slots, besides the pages.

    Attributes:
      hidden: the main model's hidden states at the positions before the last W = 1 + drafts tokens, for the MTP module;
        the newest last. Empty without drafts.
      text: for penalties and logit bias; only slots whose sampler needs it are kept up to date.
      load: tokens that chose each expert since the engine started, of the MoE layers, then of the MTP block.
    """

    hidden: Float[Array, "S W d"]
    text: TextSoFar
    load: Int[Array, "layers E"]

    @classmethod
    def empty(cls, config: ModelConfig, slots: int, drafts: int, dtype: jnp.dtype) -> Slots:
        """Returns slots without requests."""
        shape = (slots, config.vocab_size)
        window = 1 + drafts if drafts else 0
        return cls(
            hidden=jnp.zeros((slots, window, config.hidden_size), dtype),
            text=TextSoFar(jnp.zeros(shape, bool), jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)),
            load=jnp.zeros((config.num_moe_layers + (1 if drafts else 0), config.n_routed_experts), jnp.int32),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk:
    """The next C tokens of prompts, padded on the right.

    Attributes:
      tokens, positions: ids and their positions; -1 at padding.
      next_tokens: the token after each, which the MTP module reads with its hidden state.
      wants_logprobs: whether log-probabilities of the next tokens are reported.
      table: pages of each sequence.
      slot: of each sequence; the number of slots where a row is padding.
    """

    tokens: Int[Array, "B C"]
    next_tokens: Int[Array, "B C"]
    positions: Int[Array, "B C"]
    wants_logprobs: Bool[Array, " B"]
    table: Int[Array, "B N"]
    slot: Int[Array, " B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Running:
    """The requests that get tokens; W = 1 + drafts.

    Attributes:
      tokens: the last W tokens of each sequence, the newest last. The cache ends before the newest.
      valid: how many of them the MTP module has to read, counted from the newest: what the last step wrote.
      position: of the newest.
      remaining: number of tokens still to write; 0 marks padding.
      stop_tokens: -1 where a row has fewer.
      wants_logprobs: whether log-probabilities are reported.
      table, slot: as in `Chunk`.
    """

    tokens: Int[Array, "B W"]
    valid: Int[Array, " B"]
    position: Int[Array, " B"]
    remaining: Int[Array, " B"]
    stop_tokens: Int[Array, "B stops"]
    wants_logprobs: Bool[Array, " B"]
    sampler: SamplerRows
    table: Int[Array, "B N"]
    slot: Int[Array, " B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Written:
    """What the steps wrote.

    Attributes:
      tokens: new tokens of each step and row.
      count: number of them; 0 where the row had ended.
      accepted: how many of them, from the first, are accepted drafts.
      experts: int16, the experts that the token before each chose; None unless the pages record them.
      scores: log-probabilities of the tokens, and of the most likely ones at their positions.
    """

    tokens: Int[Array, "steps B W"]
    count: Int[Array, "steps B"]
    accepted: Int[Array, "steps B"]
    experts: Int[Array, "steps B W layers K"] | None
    scores: Scores  # positions: steps, B, W


@functools.partial(jax.jit, static_argnames=("graph", "scored", "micro_batches"), donate_argnames=("pages", "slots"))
def read_chunk(
    graph: ModelGraph,
    weights: nnx.State,
    pages: Pages,
    slots: Slots,
    chunk: Chunk,
    *,
    scored: bool,
    micro_batches: int,
) -> tuple[Pages, Slots, Scores | None]:
    """Reads chunks of prompts into their pages; hidden states of the last tokens go to the slots.

    Args:
      scored: return the scores of the next tokens, with the most likely one; else None.
      micro_batches: 1, or 2 to read each half of the rows as a micro-batch.
    """
    model = graph.model(weights)
    cache = PagedCache(pages, chunk.table)
    decode = model.decode if micro_batches == 1 else functools.partial(decode_in_two, model)
    read = decode(chunk.tokens, cache, chunk.positions)
    cache, hidden = read.cache.with_experts(chunk.positions, read.experts), slots.hidden
    load = read.load
    if hidden.shape[1]:
        at_next = jnp.where(chunk.positions < 0, -1, chunk.positions + 1)
        drafted = model.draft(read.hidden, chunk.next_tokens, cache, at_next)
        cache, load = drafted.cache, jnp.concatenate([load, drafted.load])
        last = jnp.sum(chunk.positions >= 0, axis=1) - 1
        newest = jnp.take_along_axis(read.hidden, jnp.maximum(last, 0)[:, None, None], axis=1)[:, 0]
        hidden = hidden.at[chunk.slot, -1].set(newest.astype(hidden.dtype), mode="drop")
    slots = dataclasses.replace(slots, hidden=hidden, load=slots.load + load)
    scores = None
    if scored:
        scores = Scores.of(model.next_logits(read.hidden), chunk.next_tokens, 1, chunk.wants_logprobs)
    return model.devices.replicated((cache.pages, slots, scores))


@jax.jit
def experts_of(experts: Int[Array, "P page layers K"], table: Int[Array, " N"]) -> Int[Array, "positions layers K"]:
    """Returns the experts recorded for every position of one sequence; those without a page are meaningless."""
    return experts.at[table].get(mode="clip").reshape(table.shape[0] * experts.shape[1], *experts.shape[2:])


@functools.partial(jax.jit, donate_argnames=("slots",))
def begin(slots: Slots, slot: Int[Array, ""], text: TextSoFar) -> Slots:
    """Sets the text, without a batch axis, of a request that is given a slot."""
    return dataclasses.replace(slots, text=jax.tree.map(lambda all_, own: all_.at[slot].set(own), slots.text, text))


@functools.partial(jax.jit, static_argnames=("graph", "most_steps", "top"), donate_argnames=("pages", "slots"))
def write_tokens(
    graph: ModelGraph,
    weights: nnx.State,
    pages: Pages,
    slots: Slots,
    running: Running,
    steps: Int[Array, ""],
    *,
    most_steps: int,
    top: int,
) -> tuple[Pages, Slots, Written]:
    """Runs up to `steps` steps, fewer if all rows end before.

    Args:
      steps: at most `most_steps`.
      top: number of most likely tokens to report.
    """
    model = graph.model(weights)
    batch, width = running.tokens.shape
    vocabulary = model.config.vocab_size
    text = jax.tree.map(lambda x: x.at[running.slot].get(mode="clip"), slots.text)
    hidden = slots.hidden.at[running.slot].get(mode="clip")
    shape = (most_steps, batch, width)
    recorded = None if pages.experts is None else jnp.zeros((*shape, *pages.experts.shape[2:]), jnp.int16)
    written = Written(
        tokens=jnp.zeros(shape, jnp.int32),
        count=jnp.zeros(shape[:2], jnp.int32),
        accepted=jnp.zeros(shape[:2], jnp.int32),
        experts=recorded,
        scores=Scores.zeros(shape, min(top, vocabulary)),
    )
    state = _State(jnp.zeros((), jnp.int32), running, pages, text, hidden, slots.load, written)
    state = lax.while_loop(
        lambda state: (state.step < steps) & jnp.any(state.running.remaining > 0),
        lambda state: _step(model, state),
        state,
    )
    text = jax.tree.map(lambda all_, own: all_.at[running.slot].set(own, mode="drop"), slots.text, state.text)
    hidden = slots.hidden.at[running.slot].set(state.hidden, mode="drop")
    return model.devices.replicated((state.pages, Slots(hidden, text, state.load), state.written))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    step: Int[Array, ""]
    running: Running
    pages: Pages
    text: TextSoFar
    hidden: Float[Array, "B W d"]
    load: Int[Array, "layers E"]
    written: Written


def _step(model: DeepSeekV3, state: _State) -> _State:
    running = state.running
    active = running.remaining > 0
    width = running.tokens.shape[1]
    drafts, draft_logits, cache, draft_load = _draft(model, state, PagedCache(state.pages, running.table))

    tokens = jnp.concatenate([running.tokens[:, -1:], *(draft[:, None] for draft in drafts)], axis=1)
    positions = jnp.where(active[:, None], running.position[:, None] + jnp.arange(width), -1)
    read = model.decode(tokens, cache, positions)
    logits = model.next_logits(read.hidden)
    text, chosen, accepted = _check(logits, drafts, draft_logits, running, state.text)

    count = jnp.where(active, jnp.minimum(accepted + 1, running.remaining), 0)
    stops = jnp.any(chosen[..., None] == running.stop_tokens[:, None, :], axis=-1) & (
        jnp.arange(width) < count[:, None]
    )
    first_stop = jnp.argmax(stops, axis=1)
    stopped = jnp.any(stops, axis=1)
    count = jnp.where(stopped, first_stop + 1, count)
    remaining = jnp.where(stopped, 0, running.remaining - count)

    # The newest W of the tokens so far, and the hidden states before them, with the newest last.
    newest = count[:, None] + jnp.arange(width)
    tokens = jnp.take_along_axis(jnp.concatenate([running.tokens, chosen], axis=1), newest, axis=1)
    hidden = state.hidden
    if drafts:
        both = jnp.concatenate([hidden, read.hidden.astype(hidden.dtype)], axis=1)
        hidden = jnp.take_along_axis(both, newest[..., None], axis=1)
    after = dataclasses.replace(
        running, tokens=tokens, valid=count, position=running.position + count, remaining=remaining
    )
    return _State(
        step=state.step + 1,
        running=after,
        pages=read.cache.with_experts(positions, read.experts).pages,
        text=text,
        hidden=hidden,
        load=state.load + jnp.concatenate([read.load, *draft_load]),
        written=_record(state, chosen, count, jnp.minimum(accepted, count), read.experts, logits),
    )


def _draft(
    model: DeepSeekV3, state: _State, cache: PagedCache
) -> tuple[list[Int[Array, " B"]], list[Float[Array, "B V"]], PagedCache, list[Int[Array, "1 E"]]]:
    """Drafts tokens by chaining the MTP module; returns them, the logits they were drawn from, cache and load.

    The module first reads what the main model computed since it last ran; then each of its own drafts, with its own
    hidden state in place of the main model's.
    """
    running = state.running
    width = running.tokens.shape[1]
    if width == 1:
        return [], [], cache, []
    active = running.remaining > 0
    index = jnp.arange(width)
    known = active[:, None] & (index >= width - running.valid[:, None])
    positions = jnp.where(known, running.position[:, None] - (width - 1) + index, -1)
    # Zeros for what is not known, so that not even a draft depends on what the slot was used for before.
    hidden = jnp.where(known[..., None], state.hidden, 0)
    drafted = model.draft(hidden, running.tokens, cache, positions)
    load, text = drafted.load, state.text
    drafts, logits = [], []
    for number in range(1, width):
        if number > 1:
            at = jnp.where(active, running.position + number - 1, -1)[:, None]
            drafted = model.draft(drafted.hidden[:, -1:], drafts[-1][:, None], drafted.cache, at)
            load, text = load + drafted.load, text.with_token(drafts[-1], running.sampler.counts_tokens)
        logits.append(adjust(model.draft_logits(drafted.hidden[:, -1:])[:, 0], running.sampler, text))
        drafts.append(choose(logits[-1], running.sampler, running.position + number, DRAFT))
    return drafts, logits, drafted.cache, [load]


def _check(
    logits: Float[Array, "B W V"],
    drafts: list[Int[Array, " B"]],
    draft_logits: list[Float[Array, "B V"]],
    running: Running,
    text: TextSoFar,
) -> tuple[TextSoFar, Int[Array, "B W"], Int[Array, " B"]]:
    """Returns the text so far, the new tokens (those after a rejected draft mean nothing), and the drafts accepted."""
    sampler = running.sampler
    going = running.remaining > 0
    accepted = jnp.zeros(going.shape, jnp.int32)
    chosen = []
    for number in range(logits.shape[1]):
        at = running.position + 1 + number
        adjusted = adjust(logits[:, number], sampler, text)
        if number < len(drafts):
            right, token = check_draft(drafts[number], adjusted, draft_logits[number], sampler, at)
        else:
            right = jnp.zeros(going.shape, bool)
            token = choose(adjusted, sampler, at, TOKEN)
        chosen.append(token)
        text = text.with_token(token, going & sampler.counts_tokens)
        going &= right
        accepted += going
    return text, jnp.stack(chosen, axis=1), accepted


def _record(
    state: _State,
    chosen: Int[Array, "B W"],
    count: Int[Array, " B"],
    accepted: Int[Array, " B"],
    experts: Int[Array, "layers B W K"] | None,
    logits: Float[Array, "B W V"],
) -> Written:
    written, step = state.written, state.step

    top = written.scores.top_tokens.shape[-1]
    scores = Scores.of(logits, chosen, top, state.running.wants_logprobs)
    if written.experts is not None and experts is not None:
        experts = jnp.moveaxis(experts, 0, 2).astype(written.experts.dtype)
    else:
        experts = None
    new = Written(chosen, count, accepted, experts, scores)
    return jax.tree.map(lambda all_, one: lax.dynamic_update_index_in_dim(all_, one, step, 0), written, new)
