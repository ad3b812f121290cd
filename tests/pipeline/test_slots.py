"""Plays tick tables with a simulator that moves labelled values and sees each that is lost or overwritten."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import ConfigError
from dsv3_jax.pipeline.schedules import make_schedule, schedule_of_step
from dsv3_jax.pipeline.simulation import schedule_figures
from dsv3_jax.pipeline.slots import FOR_INPUT, FOR_WEIGHTS, moe_layers_of_stages, tick_table

NAMES = ("1f1b", "zb1p", "dualpipe")
MADE = (make_schedule, schedule_of_step)
SIZES = [(2, 4), (2, 10), (4, 8), (4, 14), (8, 16), (16, 32)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize(("ranks", "micro_batches"), SIZES)
def test_every_value_is_there_when_it_is_needed(name: Any, made: Any, ranks: int, micro_batches: int):
    """A value is a label that says what it is; a slot that is read must hold the label that the rank needs."""
    schedule = made(name, ranks, micro_batches)
    table = tick_table(schedule)
    sends = 0
    activations: list[dict] = [{} for _ in range(ranks)]
    kept: list[dict] = [{} for _ in range(ranks)]
    gradients: list[dict] = [{} for _ in range(ranks)]
    done = set()
    for tick in range(table.ticks):
        sent_activation, sent_gradient = {}, {}
        entries = [jax.tree.map(lambda x, r=rank, t=tick: int(x[t, r]), table.entries) for rank in range(ranks)]
        for rank, entry in enumerate(entries):
            m, stage = entry.forward_micro_batch, entry.forward_stage
            if m >= 0:
                assert stage == schedule.stage(rank, schedule.direction(m))
                if stage > 0:
                    assert activations[rank].pop(entry.forward_input_slot) == ("h", stage - 1, m)
                assert entry.forward_kept_slot not in kept[rank], "a slot in use is overwritten"
                kept[rank][entry.forward_kept_slot] = ("inputs", stage, m)
                sent_activation[rank] = ("h", stage, m), entry.forward_direction
                done.add((rank, "F", m))
            m, stage, last = entry.backward_micro_batch, entry.backward_stage, entry.backward_stage == ranks - 1
            if entry.backward_parts:
                assert kept[rank][entry.backward_kept_slot] == ("inputs", stage, m)
                found = gradients[rank][entry.backward_gradient_slot]
                assert found == (("h", stage, m) if last else ("g", stage, m))
            if entry.backward_parts & FOR_INPUT:
                sent_gradient[rank] = ("g", stage - 1, m), entry.backward_direction
                done.add((rank, "I", m))
            if entry.backward_parts & FOR_WEIGHTS:
                del kept[rank][entry.backward_kept_slot], gradients[rank][entry.backward_gradient_slot]
                done.add((rank, "W", m))
        for rank, entry in enumerate(entries):
            if entry.forward_output_slot >= 0:
                gradients[rank][entry.forward_output_slot] = sent_activation[rank][0]
        for exchange in table.exchanges:
            takes_place = bool(entries[0].exchanges & exchange.bit)
            sends += takes_place
            slots = [getattr(entry, exchange.field) for entry in entries]
            assert takes_place == any(slot >= 0 for slot in slots)
            senders, receivers = zip(*exchange.pairs, strict=True)
            assert len(set(senders)) == len(senders), "a collective permutation sends from each rank once"
            assert {rank for rank, slot in enumerate(slots) if slot >= 0} <= set(receivers)
            values = (activations, sent_activation) if exchange.of_activations else (gradients, sent_gradient)
            for sender, rank in exchange.pairs:
                if slots[rank] >= 0:
                    value, direction = values[1][sender]
                    assert (rank - sender == 1) == ((direction == 0) == exchange.of_activations)
                    assert slots[rank] not in values[0][rank], "a slot in use is overwritten"
                    values[0][rank][slots[rank]] = value
        assert max(map(len, kept)) <= table.slots.kept
        assert max(map(len, activations)) <= table.slots.activations
        assert max(map(len, gradients)) <= table.slots.gradients
    assert done == {(rank, part, m) for rank in range(ranks) for part in "FIW" for m in range(micro_batches)}
    assert not any([*kept, *activations, *gradients])
    assert sends == table.sends


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("ranks", "micro_batches"), SIZES)
def test_slots_do_not_grow_with_the_micro_batches(name: Any, ranks: int, micro_batches: int):
    slots = tick_table(make_schedule(name, ranks, micro_batches)).slots
    assert slots.kept == schedule_figures(name, ranks, micro_batches).held_for_weights
    more, most = (tick_table(make_schedule(name, ranks, times * micro_batches)).slots for times in (4, 8))
    assert more == most


@pytest.mark.parametrize(
    ("layers", "dense", "stages", "expected"),
    [
        (61, 3, 16, (1, *[4] * 14, 1)),
        (61, 3, 2, (28, 30)),
        (3, 3, 1, (0,)),
        (4, 1, 2, (1, 2)),
        (3, 0, 2, (2, 1)),
        (4, 0, 4, (1, 1, 1, 1)),
        (8, 4, 4, (0, 2, 2, 0)),
    ],
)
def test_layers_of_stages(layers: int, dense: int, stages: int, expected: tuple[int, ...]):
    model = ModelConfig.preset("tiny", num_hidden_layers=layers, first_k_dense_replace=dense)
    assert moe_layers_of_stages(model, stages) == expected


def test_more_stages_than_moe_layers_are_refused():
    with pytest.raises(ConfigError, match=r"mesh.stage \(4\) .* 3 MoE layers.* use 3 or fewer"):
        moe_layers_of_stages(ModelConfig.preset("tiny", num_hidden_layers=4, first_k_dense_replace=1), 4)


def test_while_dualpipe_is_busy_a_rank_sends_two_values_in_a_tick() -> None:
    """It computes two passes there, whose results it sends; with one direction it computes one in a tick."""
    for name, each in (("dualpipe", 2), ("1f1b", 4)):
        short, long = (tick_table(schedule_of_step(name, 8, passes)) for passes in (40, 60))
        assert long.sends - short.sends == 20 * each


def test_whole_backward_passes_take_less_time_than_halves_that_repeat_work() -> None:
    """In units of a forward pass: a backward for input takes 2, and one for weights 3, for it repeats the former."""
    costs = np.array([0.0, 2.0, 3.0, 3.0])  # by `backward_parts`
    seconds = []
    for made in MADE:
        entries = tick_table(made("dualpipe", 16, 120)).entries
        seconds.append(((entries.forward_micro_batch >= 0) + costs[entries.backward_parts]).max(axis=1).sum())
    assert seconds[1] < 0.97 * seconds[0]


def test_dualpipe_computes_every_backward_pass_whole_in_fewer_ticks() -> None:
    halves, whole = (tick_table(made("dualpipe", 8, 40)) for made in MADE)
    assert halves.splits_backward
    assert not whole.splits_backward
    assert whole.ticks < halves.ticks
    assert whole.slots.kept == halves.slots.kept


def test_only_dualpipe_has_ticks_with_a_forward_and_a_full_backward_pass() -> None:
    assert [tick_table(make_schedule(name, 4, 8)).pairs for name in NAMES] == [False, False, True]
