"""Checks the routing kernels in the interpreters against the reference, Hopper's with race detection."""

from __future__ import annotations

import functools

import jax
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest
from interpreted import interpreted_hopper

import pallas_kernels as pk
from pallas_kernels.routing import hopper_gate, hopper_rows, reference, tpu_gate, tpu_rows
from pallas_kernels.routing.reference import GateParameters

# Name: sequences, tokens, experts, has a bias, has a mask, parameters. Tokens are no multiple of a tile's 16; the first
# router has more tiles than one multiprocessor has blocks.
ROUTERS = {
    "V3's groups, masked": (2, 18, 32, True, True, GateParameters(4, 4, 2, "sigmoid", "top2_sum", True, 2.5)),
    "one group, softmax": (1, 7, 48, False, False, GateParameters(6, 1, 1, "softmax", "max", False, 1.0)),
    "groups by their best, a mask": (1, 17, 32, True, True, GateParameters(2, 2, 1, "softmax", "max", True, 16.0)),
}


def router_inputs(name: str, ties: bool = False):
    sequences, tokens, experts, biased, masked, parameters = ROUTERS[name]
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(sequences, tokens, experts))
    bias = rng.normal(size=experts) - 1  # negative: experts of other groups must not win with a zero
    if ties:
        logits, bias = np.round(logits), np.zeros_like(bias)
    mask = jnp.asarray(rng.random((sequences, tokens)) < 0.7) if masked else None
    return jnp.asarray(logits, jnp.float32), jnp.asarray(bias, jnp.float32) if biased else None, mask, parameters


def check_gate(got, wanted) -> None:
    np.testing.assert_array_equal(got.expert_index, wanted.expert_index)
    np.testing.assert_allclose(got.gate, wanted.gate, rtol=1e-5)
    np.testing.assert_array_equal(got.counts, wanted.counts)
    np.testing.assert_array_equal(got.unrestricted_counts, wanted.unrestricted_counts)
    np.testing.assert_allclose(got.share_sums, wanted.share_sums, rtol=1e-5)


@pytest.mark.parametrize(("router", "ties"), [*((name, False) for name in ROUTERS), ("V3's groups, masked", True)])
def test_gate_on_hopper(router, ties):
    """Ties go to the lowest index, among experts and among groups."""
    inputs = router_inputs(router, ties)
    with interpreted_hopper(num_cores=1) as interpret:
        check_gate(hopper_gate.gate(*inputs, interpret=interpret), reference.gate(*inputs))


@pytest.mark.parametrize(("router", "ties"), [*((name, False) for name in ROUTERS), ("V3's groups, masked", True)])
def test_gate_on_tpu(router, ties):
    inputs = router_inputs(router, ties)
    check_gate(tpu_gate.gate(*inputs, interpret=pltpu.InterpretParams()), reference.gate(*inputs))


@pytest.mark.parametrize("device", ["hopper", "tpu"])
def test_nan_logits_choose_existing_experts(device):
    logits, bias, mask, parameters = router_inputs("groups by their best, a mask")
    inputs = logits.at[0, 3, 20:].set(jnp.nan), bias, mask, parameters
    if device == "tpu":
        got = tpu_gate.gate(*inputs, interpret=pltpu.InterpretParams())
    else:
        with interpreted_hopper() as interpret:
            got = hopper_gate.gate(*inputs, interpret=interpret)
    assert got.expert_index.min() >= 0
    assert got.expert_index.max() < logits.shape[-1]
    np.testing.assert_array_equal(jnp.isnan(got.gate[0, :, 0]), jnp.arange(logits.shape[1]) == 3)


DEVICES = {"hopper": (hopper_gate, hopper_rows), "tpu": (tpu_gate, tpu_rows)}


@pytest.mark.parametrize("device", DEVICES)
def test_gradient_through_the_gate_of_a_device(device, on_device):
    """Compares the public function on the device's kernel with the same on this machine's reference."""
    logits, bias, mask, p = router_inputs("groups by their best, a mask")
    weights = jax.random.normal(jax.random.key(1), (*logits.shape[:2], p.num_experts_per_tok))
    options = p._asdict() | {"token_mask": mask}

    def loss(logits, **implementation):
        gates = pk.gate(logits, bias, **options, **implementation)
        return jnp.sum(gates.gate * weights) + jnp.sum(jnp.square(gates.affinity_mean))

    wanted = jax.grad(loss)(logits)
    with on_device(device, DEVICES[device][0], "gate"):
        got = jax.block_until_ready(jax.grad(functools.partial(loss, implementation=device))(logits))
    np.testing.assert_allclose(got, wanted, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_through_permute_and_combine_of_a_device(device, on_device):
    """Compares the public functions on the device's kernels with the formula, which does not sort rows."""
    rng = np.random.default_rng(3)
    index = jnp.asarray([[0, 2], [2, 1], [2, 0]], jnp.int32)
    x, out_bar = (jnp.asarray(rng.normal(size=(3, 128)), jnp.float32) for _ in range(2))
    gate = jnp.asarray(rng.random((3, 2)), jnp.float32)

    def through_rows(x, gate):
        rows, permutation = pk.permute(x, index, 4, row_alignment=4, implementation=device)
        return jnp.sum(pk.combine(rows * rows, gate, permutation, implementation=device) * out_bar)

    def formula(x, gate):
        return jnp.sum(gate.sum(1, keepdims=True) * x * x * out_bar)

    with on_device(device, DEVICES[device][1], "permute", "combine", "combine_gradient"):
        got = jax.block_until_ready(jax.grad(through_rows, argnums=(0, 1))(x, gate))
    for a, b in zip(got, jax.grad(formula, argnums=(0, 1))(x, gate), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


# Tokens, slots per token, experts, width, row alignment: several chunks per row; odd widths; spare rows.
MOVES = {
    "V3's slots, padded groups": (3, 8, 16, 2048, 4, jnp.bfloat16),
    "no padding, float32": (9, 3, 4, 384, 1, jnp.float32),
    "one token": (1, 2, 3, 256, 8, jnp.bfloat16),
}


def move_inputs(name: str):
    tokens, chosen, experts, width, alignment, dtype = MOVES[name]
    rng = np.random.default_rng(0)
    index = jnp.asarray(np.argsort(rng.random((tokens, experts)), axis=1)[:, :chosen], jnp.int32)
    row_of_slot, slot_of_row, _ = reference.expert_order(index, experts, alignment)
    x, out_bar = (jnp.asarray(rng.normal(size=(tokens, width)), dtype) for _ in range(2))
    rows = jnp.asarray(rng.normal(size=(slot_of_row.shape[0], width)), dtype)
    gate = jnp.asarray(rng.random((tokens, chosen)), jnp.float32)
    return x, rows, gate, out_bar, row_of_slot, slot_of_row


def check_moves(kernels, interpret, inputs) -> None:
    x, rows, gate, out_bar, row_of_slot, slot_of_row = inputs
    got = kernels.permute(x, row_of_slot, slot_of_row, interpret=interpret)
    np.testing.assert_array_equal(got, reference.permute(x, row_of_slot, slot_of_row))
    one_step = 2.0**-7 if x.dtype == jnp.bfloat16 else 1e-5  # sums are rounded once, in any order of adding
    got = kernels.combine(rows, gate, row_of_slot, interpret=interpret)
    assert got.dtype == rows.dtype
    wanted = reference.combine(rows, gate, row_of_slot)
    np.testing.assert_allclose(got.astype("f4"), wanted.astype("f4"), rtol=one_step, atol=1e-5)
    rows_bar, gate_bar = kernels.combine_gradient(rows, gate, out_bar, row_of_slot, slot_of_row, interpret=interpret)
    wanted_rows, wanted_gate = reference.combine_gradient(rows, gate, out_bar, row_of_slot, slot_of_row)
    np.testing.assert_array_equal(rows_bar, wanted_rows)
    np.testing.assert_allclose(gate_bar, wanted_gate, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("move", MOVES)
def test_rows_on_hopper(move):
    with interpreted_hopper() as interpret:
        check_moves(hopper_rows, interpret, move_inputs(move))


@pytest.mark.parametrize("move", MOVES)
def test_rows_on_tpu(move):
    check_moves(tpu_rows, pltpu.InterpretParams(), move_inputs(move))
