"""Schedules as tables: played by a plain simulator that moves tokens, which sees every value lost or overwritten."""

from __future__ import annotations

from typing import Any

import pytest

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import ConfigError
from dsv3_jax.pipeline.schedules import make_schedule
from dsv3_jax.pipeline.simulation import Durations, schedule_figures, simulate
from dsv3_jax.pipeline.slots import INPUT, WEIGHTS, lockstep, lockstep_time, moe_layers_of_stages
from dsv3_jax.planning.layers import stage_layers

NAMES = ("1f1b", "zb1p", "dualpipe")
SIZES = [(2, 4), (2, 10), (4, 8), (4, 14), (8, 16), (16, 32)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("ranks", "micro_batches"), SIZES)
def test_every_value_is_there_when_it_is_needed(name: Any, ranks: int, micro_batches: int):
    """Values are labels of what they are; a place read must bear the label of what the rank computes from it."""
    schedule = make_schedule(name, ranks, micro_batches)
    tables, places = lockstep(schedule)
    activations: list[dict] = [{} for _ in range(ranks)]
    kept: list[dict] = [{} for _ in range(ranks)]
    gradients: list[dict] = [{} for _ in range(ranks)]
    done = set()
    for tick in range(tables.forward.shape[0]):
        sent_activation, sent_gradient = {}, {}
        for rank in range(ranks):

            def at(table: Any, rank: int = rank, tick: int = tick) -> int:
                return int(table[tick, rank])

            m, stage = at(tables.forward), at(tables.forward_stage)
            if m >= 0:
                assert stage == schedule.stage(rank, schedule.direction(m))
                if stage > 0:
                    assert activations[rank].pop(at(tables.forward_inbox)) == ("h", stage - 1, m)
                assert at(tables.forward_kept) not in kept[rank], "a place in use is written over"
                kept[rank][at(tables.forward_kept)] = ("inputs", stage, m)
                sent_activation[rank] = ("h", stage, m), at(tables.forward_direction)
                done.add((rank, "F", m))
            kind, m, stage = (at(t) for t in (tables.backward, tables.backward_micro_batch, tables.backward_stage))
            if kind:
                last = stage == ranks - 1
                assert kept[rank][at(tables.backward_kept)] == ("inputs", stage, m)
                assert gradients[rank][at(tables.backward_inbox)] == (("h", stage, m) if last else ("g", stage, m))
                if kind & INPUT:
                    sent_gradient[rank] = ("g", stage - 1, m), at(tables.backward_direction)
                    done.add((rank, "I", m))
                if kind & WEIGHTS:
                    del kept[rank][at(tables.backward_kept)], gradients[rank][at(tables.backward_inbox)]
                    done.add((rank, "W", m))
        for rank in range(ranks):
            own = int(tables.forward_out[tick, rank])
            if own >= 0:
                gradients[rank][own] = sent_activation[rank][0]
            for way, step in (("up", -1), ("down", 1)):
                for inbox, sent, table, forward in (
                    (activations, sent_activation, getattr(tables, f"arriving_activation_{way}"), 0),
                    (gradients, sent_gradient, getattr(tables, f"arriving_gradient_{way}"), 1),
                ):
                    place = int(table[tick, rank])
                    if place >= 0:
                        value, direction = sent[rank + step]
                        assert (way == "up") == (direction == forward)
                        assert place not in inbox[rank], "a place in use is written over"
                        inbox[rank][place] = value
        assert max(map(len, kept)) <= places.kept
        assert max(map(len, activations)) <= places.activations
        assert max(map(len, gradients)) <= places.gradients
    assert done == {(rank, part, m) for rank in range(ranks) for part in "FIW" for m in range(micro_batches)}
    assert not any([*kept, *activations, *gradients])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("ranks", "micro_batches"), SIZES)
def test_places_are_the_peak_of_the_schedule_and_not_the_micro_batches(name: Any, ranks: int, micro_batches: int):
    _, places = lockstep(make_schedule(name, ranks, micro_batches))
    assert places.kept == schedule_figures(name, ranks, micro_batches).held_for_weights
    more = 4 * micro_batches
    assert lockstep(make_schedule(name, ranks, more))[1] == lockstep(make_schedule(name, ranks, 2 * more))[1]


@pytest.mark.parametrize("name", NAMES)
def test_lockstep_takes_no_less_than_ranks_that_wait_for_none(name: Any):
    schedule = make_schedule(name, 4, 16)
    assert lockstep_time(schedule, Durations()) >= simulate(schedule, Durations()).total


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
    if dense <= -(-layers // stages):
        assert tuple(stage["moe"] for stage in stage_layers(model, stages)) == expected


def test_more_stages_than_moe_layers_is_said():
    with pytest.raises(ConfigError, match=r"mesh.stage \(4\) .* 3 MoE layers.* use 3 or fewer"):
        moe_layers_of_stages(ModelConfig.preset("tiny", num_hidden_layers=4, first_k_dense_replace=1), 4)
