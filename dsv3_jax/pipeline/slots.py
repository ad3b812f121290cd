"""The tick table of a pipeline schedule: what every rank computes at every tick, and in which slots values wait.

All ranks advance together, tick by tick: what a rank computes in one tick, other ranks can use from the next tick on.
Values that wait are kept in buffers on their rank: activations and gradients that arrived from another rank, and what
the backward pass needs of the layers' forward pass (`residuals`). A slot is an entry of such a buffer. The training
step runs this table (`executor`), and plans count what it asks for (`facts`). How many MoE layers each stage holds is
decided here too.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import ConfigError
from dsv3_jax.pipeline.schedules import PipelineSchedule
from dsv3_jax.pipeline.simulation import simulate

FOR_INPUT, FOR_WEIGHTS = 1, 2
"""Bits of `TickEntry.backward_parts`: the backward for input and the backward for weights."""

LOOK_UP, PREDICT, LOOK_UP_GRADIENT = 1, 2, 4
"""Bits of `TickEntry.together`: embeddings of a first stage, losses of a last stage, gradients by those embeddings."""

_RECEIVED = ("even_activation_slot", "odd_activation_slot", "even_gradient_slot", "odd_gradient_slot")
"""Fields of `TickEntry` with the slot of what is received; their order is that of the bits of `TickEntry.exchanges`."""

_NONE = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TickEntry:
    """What one rank does at one tick: int32 scalars; in `TickTable.entries`, int32 [ticks, ranks]; -1 means nothing.

    What is sent at a tick is received at its end. Neighbours exchange values in pairs: an "even" exchange is between
    ranks 2 i and 2 i + 1, an "odd" one between ranks 2 i + 1 and 2 i + 2. While both directions of a pipeline are
    busy, all ranks take part in one exchange of activations and one of gradients in each tick, even and odd in turn.

    Attributes:
      forward_micro_batch: the micro-batch whose forward pass is computed.
      forward_direction: its direction.
      forward_stage: the stage that is computed.
      forward_input_slot: slot of the stage's input among the received activations; -1 on the first stage.
      forward_kept_slot: slot for the residuals of the stage's layers.
      forward_output_slot: on the last stage, slot for its output among the received gradients. No gradient arrives
        there; the backward pass computes the loss from the output instead.
      backward_parts: which parts of a backward pass are computed: bits FOR_INPUT and FOR_WEIGHTS; 0 means none.
      backward_micro_batch, backward_direction, backward_stage: as for the forward pass.
      backward_gradient_slot: slot of the gradient by the stage's output (on the last stage, at first, of the output).
      backward_kept_slot: slot of the residuals of the stage's layers.
      together: what all ranks compute together, each with its part of the vocabulary's weights, because a first or a
        last stage needs it: bits LOOK_UP, PREDICT and LOOK_UP_GRADIENT, the same on all ranks; 0 means nothing.
      exchanges: the exchanges of this tick, bits in the order of the next four fields; the same on all ranks.
      even_activation_slot, odd_activation_slot: slot for the activation that arrives in the exchange.
      even_gradient_slot, odd_gradient_slot: slot for the gradient that arrives in the exchange.
    """

    forward_micro_batch: Any
    forward_direction: Any
    forward_stage: Any
    forward_input_slot: Any
    forward_kept_slot: Any
    forward_output_slot: Any
    backward_parts: Any
    backward_micro_batch: Any
    backward_direction: Any
    backward_stage: Any
    backward_gradient_slot: Any
    backward_kept_slot: Any
    together: Any
    exchanges: Any
    even_activation_slot: Any
    odd_activation_slot: Any
    even_gradient_slot: Any
    odd_gradient_slot: Any


@dataclasses.dataclass(frozen=True)
class Exchange:
    """An exchange between neighbouring ranks, in the ticks whose entries have its bit in `exchanges`.

    Attributes:
      field: the field of the entries with the slot of what is received.
      bit: its bit.
      pairs: sender and receiver of every value that is ever needed.
    """

    field: str
    bit: int
    pairs: tuple[tuple[int, int], ...]

    @property
    def of_activations(self) -> bool:
        """Whether activations are sent, and not gradients."""
        return "activation" in self.field


@dataclasses.dataclass(frozen=True)
class SlotCounts:
    """How many slots each buffer of a rank has: as many as the rank that needs most.

    Attributes:
      activations: received activations, until their forward pass.
      kept: residuals of layers, from the forward pass to the backward for weights; one slot holds one micro-batch.
      gradients: received gradients, until the backward for weights.
    """

    activations: int
    kept: int
    gradients: int


@dataclasses.dataclass(frozen=True)
class TickTable:
    """A pipeline schedule tick by tick, for all ranks.

    Attributes:
      entries: numpy arrays, int32 [ticks, ranks].
      slots: the sizes of the buffers that the entries refer to.
    """

    entries: TickEntry
    slots: SlotCounts

    @property
    def ticks(self) -> int:
        """How many ticks a step has."""
        return self.entries.forward_micro_batch.shape[0]

    @property
    def ranks(self) -> int:
        """How many ranks the pipeline has."""
        return self.entries.forward_micro_batch.shape[1]

    @property
    def splits_backward(self) -> bool:
        """Whether any backward for input is computed without its backward for weights."""
        return bool((self.entries.backward_parts == FOR_INPUT).any())

    @property
    def pairs(self) -> bool:
        """Whether any rank computes a forward and a full backward pass in one tick."""
        full = self.entries.backward_parts == FOR_INPUT | FOR_WEIGHTS
        return bool((full & (self.entries.forward_micro_batch != _NONE)).any())

    @property
    def exchanges(self) -> tuple[Exchange, ...]:
        """The exchanges that any tick needs."""
        found = []
        for index, field in enumerate(_RECEIVED):
            receivers = np.flatnonzero((getattr(self.entries, field) != _NONE).any(axis=0)).tolist()
            odd = int("odd" in field)
            pairs = tuple((((rank + odd) ^ 1) - odd, rank) for rank in receivers)
            found += [Exchange(field, 1 << index, pairs)] if pairs else []
        return tuple(found)

    @property
    def sends(self) -> int:
        """How many values a rank sends in a step, if it takes part in every exchange."""
        return sum(int((self.entries.exchanges[:, 0] & exchange.bit != 0).sum()) for exchange in self.exchanges)


def tick_table(schedule: PipelineSchedule) -> TickTable:
    """Returns the tick table of a schedule: each action is in the first tick after all that it requires."""
    timeline = simulate(schedule, lambda action: 1)
    shape = (schedule.ranks, schedule.micro_batches)
    forward, for_input, for_weights = when = np.zeros((3, *shape), int)
    for rank, actions in enumerate(timeline.ranks):
        for timed in actions:
            for chunk in timed.action:
                when["FIW".index(chunk.part), rank, chunk.micro_batch] = timed.start

    rank, micro_batch = np.indices(shape)
    direction = np.broadcast_to([schedule.direction(m) for m in range(schedule.micro_batches)], shape)
    up = direction == 0
    stage = np.where(up, rank, schedule.ranks - 1 - rank)
    first_stage, last_stage = stage == 0, stage == schedule.ranks - 1
    step = np.where(up, 1, -1)
    before, after = (np.clip(rank + way, 0, schedule.ranks - 1) for way in (-step, step))
    # The tick at which a value is sent; it can be used from the next one on.
    activation_sent = forward[before, micro_batch]
    gradient_sent = np.where(last_stage, forward, for_input[after, micro_batch])
    activation_slot, activations = _slots(activation_sent + 1, forward, ~first_stage)
    kept_slot, kept = _slots(forward, for_weights, np.ones(shape, bool))
    gradient_slot, gradients = _slots(gradient_sent + 1, for_weights, np.ones(shape, bool))

    tables = {
        field.name: np.full((int(timeline.total), schedule.ranks), _NONE, np.int32)
        for field in dataclasses.fields(TickEntry)
    }

    def write(name: str, tick: np.ndarray, value: np.ndarray, where: np.ndarray | None = None) -> None:
        where = np.ones(shape, bool) if where is None else where
        tables[name][tick[where], rank[where]] = value[where]

    write("forward_micro_batch", forward, micro_batch)
    write("forward_direction", forward, direction)
    write("forward_stage", forward, stage)
    write("forward_input_slot", forward, activation_slot, ~first_stage)
    write("forward_kept_slot", forward, kept_slot)
    write("forward_output_slot", forward, gradient_slot, last_stage)
    tables["backward_parts"][:] = 0
    for tick, part in ((for_input, FOR_INPUT), (for_weights, FOR_WEIGHTS)):
        tables["backward_parts"][tick, rank] += part
        write("backward_micro_batch", tick, micro_batch)
        write("backward_direction", tick, direction)
        write("backward_stage", tick, stage)
        write("backward_gradient_slot", tick, gradient_slot)
        write("backward_kept_slot", tick, kept_slot)
    for kind, sent, slot, needed in (
        ("activation", activation_sent, activation_slot, ~first_stage),
        ("gradient", gradient_sent, gradient_slot, ~last_stage),
    ):
        # Activations go up in the first direction, and gradients down; both come from the lower rank or the higher.
        lower = np.where(up == (kind == "activation"), rank - 1, rank)
        write(f"even_{kind}_slot", sent, slot, needed & (lower % 2 == 0))
        write(f"odd_{kind}_slot", sent, slot, needed & (lower % 2 == 1))
    tables["exchanges"][:] = 0
    for index, field in enumerate(_RECEIVED):
        tables["exchanges"] += (1 << index) * (tables[field] != _NONE).any(axis=1, keepdims=True)
    tables["together"][:] = 0
    parts, stages = tables["backward_parts"], tables["backward_stage"]
    for bit, needed in (
        (LOOK_UP, tables["forward_stage"] == 0),
        (PREDICT, (stages == schedule.ranks - 1) & (parts & FOR_INPUT != 0)),
        (LOOK_UP_GRADIENT, (stages == 0) & (parts & FOR_WEIGHTS != 0)),
    ):
        tables["together"] += bit * needed.any(axis=1, keepdims=True)
    return TickTable(TickEntry(**tables), SlotCounts(activations, kept, gradients))


def _slots(
    first: Int[np.ndarray, "ranks A"], last: Int[np.ndarray, "ranks A"], used: Bool[np.ndarray, "ranks A"]
) -> tuple[Int[np.ndarray, "ranks A"], int]:
    """Returns a slot for every value, and how many slots a rank needs.

    A value needs its slot from tick `first` to tick `last`, both included, and gets the lowest that is free. In order
    of their first ticks, values need no more slots than there are values at once.
    """
    slots = np.full(first.shape, _NONE)
    most = 0
    for rank in range(first.shape[0]):
        free_from: list[int] = []
        for begin, end, value in sorted(zip(first[rank].tolist(), last[rank].tolist(), itertools.count())):
            if not used[rank, value]:
                continue
            slot = next((slot for slot, free in enumerate(free_from) if free <= begin), len(free_from))
            if slot == len(free_from):
                free_from.append(0)
            free_from[slot] = end + 1
            slots[rank, value] = slot
        most = max(most, len(free_from))
    return slots, most


def layer_slots(layers: Sequence[int], depths: int) -> int:
    """Returns how many MoE layers, or blocks of MTP modules behind those of the last stage, a stage has memory for.

    Args:
      layers: how many MoE layers each stage holds.
      depths: the number of MTP modules.
    """
    return max(*layers, layers[-1] + depths)


def moe_layers_of_stages(model: ModelConfig, stages: int) -> tuple[int, ...]:
    """Returns how many MoE layers each stage holds: equally many per stage in order, and the rest on the last.

    All dense layers, which come first, are on the first stage. Where they are more than its share of layers, the MoE
    layers are divided among the other stages.

    Raises:
      ConfigError: there are several stages, and more of them than MoE layers.
    """
    moe, dense = model.num_moe_layers, model.num_dense_layers
    if stages > max(moe, 1):
        near = f"use {moe} or fewer" if moe else "it has none: use stage=1"
        raise ConfigError(
            f"mesh.stage ({stages}) must not exceed the model's {moe} MoE layers, which it divides; {near}"
        )
    a_stage = -(-model.num_hidden_layers // stages)
    if dense > a_stage:
        a_stage = -(-moe // (stages - 1))
        starts = [0] + [min(stage * a_stage, moe) for stage in range(stages)]
    else:
        starts = [min(max(stage * a_stage - dense, 0), moe) for stage in range(stages)] + [moe]
    return tuple(after - before for before, after in itertools.pairwise(starts))
