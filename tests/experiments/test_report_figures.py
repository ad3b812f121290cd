"""Checks the traffic and times of the report's own run, each by hand from the model's published sizes."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest

TOKENS = 15360 * 4096 / 2048  # of a device in a step
SCALE = 4 / 128
LINEAR = 187_105_280  # weights of the linear maps of attention, of which norms have none
EXPERT = 3 * 7168 * 2048
HELD = Counter({"moe": 8})  # the layers of a rank in the middle, which holds two stages of four


def flows_of(run: Any, **changes: Any) -> dict[str, Any]:
    config = dataclasses.replace(run.REPORT_RUN, **changes)
    return {flow.what: flow for flow in run.traffic(config, HELD)}


@pytest.mark.parametrize(("policy", "dispatched"), [("report", 2), ("full", 3)])
@pytest.mark.parametrize(("precision", "there"), [("fp8", 1 + SCALE), ("bfloat16", 2)])
def test_tokens_to_experts_and_back(run: Any, policy: str, dispatched: int, precision: str, there: float) -> None:
    """Rows are dispatched forward and for gradients, and combined both times in bfloat16: to 4 nodes, to 8 experts."""
    flow = flows_of(run, rematerialisation=policy, precision=precision)[run.TOKENS]
    each = 7168 * (dispatched * there + 2 * 2)
    rows = 120 * 4096 * 8 / 2  # of both directions' 120 micro-batches together, through eight layers
    outside = rows * each * 4 * 7 / 8
    assert flow.sent == pytest.approx(outside + rows * each * 8)
    assert flow.seconds == pytest.approx(max(outside / 50e9, rows * each * 8 / 160e9))


def test_replicas_and_hidden_states(run: Any) -> None:
    """Gradients in float32 there, new weights in FP8 or bfloat16 back; hidden states up and gradients down."""
    flows = flows_of(run)
    whole = 2 * 7168 + 1536 + 512 + 256 * 7168 + 256  # norms and router with its biases, in bfloat16
    fp8 = LINEAR + EXPERT
    sent = 8 * (1 - 1 / 256) * (whole * (4 + 2) + fp8 * (4 + 1 + 4 / 128**2))  # on 2 x 128 ranks
    sent += 8 * (1 - 1 / 4) * 4 * EXPERT * (4 + 1 + 4 / 128**2)  # on 2 x 2 ranks
    assert flows[run.REPLICAS].sent == pytest.approx(sent)
    assert flows[run.HIDDEN_STATES].sent == 2 * 120 * 4096 * 7168 * 2


def test_times_of_the_best_kernels(run: Any) -> None:
    """Forward three times, up-projections once more; attention four times forward; 7 bubbles of 2 in 360 chunks."""
    plan = run.report_plan(run.REPORT_RUN)
    layers = 62
    expert_layers = 59
    router = 256 * 7168  # that of the MTP module is counted among its linear maps
    linear = 2 * (layers * LINEAR + expert_layers * 9 * EXPERT + 3 * 3 * 7168 * 18432 + router)
    up = 2 * layers * (128 * 192 * 1536 + 128 * 256 * 512)
    plain = 2 * (2 * 129280 * 7168 + 2 * 7168**2 + 58 * router)
    core = 2 * layers * 128 * (192 + 128) * 2048
    time = plan.expected
    assert time.fp8_products == pytest.approx((3 * linear + up) * TOKENS / (1979e12 * 0.78))
    assert time.products == pytest.approx(3 * plain * TOKENS / (989e12 * 0.78))
    assert time.attention == pytest.approx(4 * core * TOKENS / (989e12 * 0.78 * 0.65))
    computing = time.fp8_products + time.products + time.attention + time.memory
    assert time.bubble == pytest.approx(computing * 7 * 2 / (3 * 120))
    state = plan.state
    update = 2 * (state.masters + state.moments) + state.gradients + state.working_weights
    assert time.optimizer == pytest.approx(update / (3.35e12 * 0.9))
    once = 3 * (linear + plain + core)
    assert plan.recomputed == pytest.approx((up + core) / once)
    # DualPipe hides tokens and hidden states behind computation, and never what is sent once per step.
    replicas = next(flow.seconds for flow in plan.flows if flow.what == run.REPLICAS)
    hidden = sum(flow.seconds for flow in plan.flows if flow.what in (run.TOKENS, run.HIDDEN_STATES))
    assert time.exposed == pytest.approx(replicas + max(hidden - computing, 0))


def test_other_schedules_expose_the_exchange_of_tokens(run: Any) -> None:
    config = dataclasses.replace(run.REPORT_RUN, schedule="zb1p")
    plan = run.report_plan(config)
    open_ = sum(flow.seconds for flow in plan.flows if flow.what in (run.REPLICAS, run.TOKENS))
    assert plan.expected.exposed == pytest.approx(open_)


def test_hidden_communication_is_hidden_only_while_there_is_computation(run: Any) -> None:
    config = run.REPORT_RUN
    plan = run.report_plan(config)
    slow = [dataclasses.replace(flow, seconds=100.0) for flow in plan.flows if flow.what == run.TOKENS]
    time = run.step_time(config, plan.layers, plan.state, slow, run.Reached())
    assert time.exposed == pytest.approx(100.0 - time.fp8_products - time.products - time.attention - time.memory)


def test_memory_of_a_device(run: Any) -> None:
    """Masters over all replicas, an FP8 copy, gradients in float32, moments, and activations of 8.5 micro-batches."""
    plan = run.report_plan(run.REPORT_RUN)
    plain = 2 * 7168 + 1536 + 512 + 256 * 7168 + 256
    everywhere, experts = plain + LINEAR + EXPERT, 4 * EXPERT  # on 2 x 128 ranks and on 2 x 2
    masters = 8 * 4 * (everywhere / 256 + experts / 4)
    state = plan.state
    assert state.masters == masters
    assert state.moments == masters  # two in bfloat16
    assert state.gradients == 8 * 4 * (everywhere + experts)
    assert state.working_weights == 8 * (2 * plain + (1 + 4 / 128**2) * (LINEAR + EXPERT + experts))

    d, latents = 7168, 1536 + 512 + 64
    kept = 2 * d + 2 * latents + 128 * 128 * (1.5 + SCALE) + 2 * d + 2 * 9 * 2048 * (1 + SCALE) + 256 * 4 + 8 * d * 2
    assert sum(plan.activations.kept.values()) == pytest.approx(8 * 17 / 2 * 4096 * kept)
    again = (2 * d + latents) * (4 + 1 + SCALE) + 128 * (192 + 128 + 128) * 2 + 8 * d * (1 + SCALE)
    core = 4096 * (128 * ((192 + 128 + 128) * 2 + 4) + 64 * 4)  # gradients, and a mean of each row
    assert plan.activations.recomputed == pytest.approx(4096 * (kept + again) + core)
    held = state.working_weights + state.gradients + 2 * masters + 8 * 17 / 2 * 4096 * kept
    assert plan.memory == pytest.approx(held + 4096 * (kept + again) + core + 2 * 2**30)
