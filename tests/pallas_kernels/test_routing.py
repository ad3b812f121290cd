"""Checks routing against loops over tokens in float64, and its gradients against autodiff of the plain formula."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pallas_kernels as pk


def route_by_hand(logits, bias, chosen, groups, kept, softmax=False, group_max=False, normalise=True, factor=1.0):
    """Returns experts and gates of one token, computed in float64; ties go to the lowest index."""
    logits = np.asarray(logits, np.float64)
    scores = np.exp(logits) / np.exp(logits).sum() if softmax else 1 / (1 + np.exp(-logits))
    biased = scores + bias
    size = len(scores) // groups
    ranks = []
    for g in range(groups):
        members = np.sort(biased[g * size : (g + 1) * size])[::-1]
        ranks.append(members[0] if group_max else members[:2].sum())
    best_groups = sorted(range(groups), key=lambda g: (-ranks[g], g))[:kept]
    reachable = [e for g in best_groups for e in range(g * size, (g + 1) * size)] if groups > 1 else range(len(scores))
    experts = sorted(reachable, key=lambda e: (-biased[e], e))[:chosen]
    gates = scores[experts]
    if normalise:
        gates = gates / gates.sum()
    return experts, gates * factor


# Experts, groups, groups allowed, experts chosen, softmax, groups by their best. Few, since each is compiled.
ROUTERS = [
    (8, 1, 1, 3, False, False),
    (32, 4, 2, 6, False, False),
    (8, 4, 3, 1, True, True),
    (6, 2, 1, 3, True, False),
    (6, 2, 2, 6, False, True),
]


@pytest.mark.parametrize("router", ROUTERS)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 1000))
def test_gate_against_loops(router, seed):
    experts, groups, kept, chosen, softmax, group_max = router
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(2, 5, experts)).astype(np.float32)
    bias = (rng.normal(size=experts) - 1.0).astype(np.float32)  # negative: masked groups must not win with a zero
    gates = pk.gate(
        jnp.asarray(logits),
        jnp.asarray(bias),
        num_experts_per_tok=chosen,
        n_group=groups,
        topk_group=kept,
        scoring_func="softmax" if softmax else "sigmoid",
        group_score="max" if group_max else "top2_sum",
        routed_scaling_factor=2.5,
    )
    load = np.zeros(experts, int)
    for s in range(2):
        for t in range(5):
            want, weights = route_by_hand(logits[s, t], bias, chosen, groups, kept, softmax, group_max, factor=2.5)
            np.testing.assert_array_equal(gates.expert_index[s, t], want)
            np.testing.assert_allclose(gates.gate[s, t], weights, rtol=2e-5)
            load[want] += 1
    np.testing.assert_array_equal(gates.load, load)


def test_ties_go_to_the_lowest_index():
    gates = pk.gate(jnp.zeros((1, 3, 8)), None, num_experts_per_tok=3, n_group=4, topk_group=2)
    np.testing.assert_array_equal(gates.expert_index, np.broadcast_to([0, 1, 2], (1, 3, 3)))


def test_statistics_against_the_report():
    """Compares with Eq. 18-20 written as loops, which leave a padded token out."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 7, 8)).astype(np.float32)
    bias = rng.normal(size=8).astype(np.float32)
    mask = np.ones((2, 7), bool)
    mask[1, 4:] = False
    gates = pk.gate(
        jnp.asarray(logits),
        jnp.asarray(bias),
        num_experts_per_tok=2,
        n_group=4,
        topk_group=2,
        token_mask=jnp.asarray(mask),
    )
    scores = 1 / (1 + np.exp(-logits.astype(np.float64)))
    for s in range(2):
        real = scores[s][mask[s]]
        np.testing.assert_allclose(gates.affinity_mean[s], (real / real.sum(-1, keepdims=True)).mean(0), rtol=1e-5)
        top = np.argsort(-real, axis=-1)[:, :2]
        counts = np.bincount(top.ravel(), minlength=8)
        np.testing.assert_allclose(gates.selection_fraction[s], 8 / (2 * len(real)) * counts, rtol=1e-6)
    assert int(gates.load.sum()) == 2 * mask.sum()


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@pytest.mark.parametrize("normalise", [True, False])
def test_gate_gradient_is_that_of_the_formula(scoring, normalise):
    rng = np.random.default_rng(1)
    logits = jnp.asarray(rng.normal(size=(2, 6, 8)), jnp.float32)
    bias = jnp.asarray(rng.normal(size=8), jnp.float32)
    weights = jnp.asarray(rng.normal(size=(2, 6, 3)), jnp.float32)
    of_mean = jnp.asarray(rng.normal(size=(2, 8)), jnp.float32)
    mask = jnp.asarray(rng.random((2, 6)) < 0.8)
    settings_ = {"num_experts_per_tok": 3, "n_group": 2, "topk_group": 2, "scoring_func": scoring}

    def ours(logits, bias):
        gates = pk.gate(logits, bias, **settings_, norm_topk_prob=normalise, token_mask=mask)
        return jnp.sum(gates.gate * weights) + jnp.sum(gates.affinity_mean * of_mean)

    index = pk.gate(logits, bias, **settings_).expert_index

    def formula(logits):
        scores = jax.nn.sigmoid(logits) if scoring == "sigmoid" else jax.nn.softmax(logits)
        chosen = jnp.take_along_axis(scores, index, -1)
        gates = chosen / chosen.sum(-1, keepdims=True) if normalise else chosen
        shares = scores / scores.sum(-1, keepdims=True) * mask[..., None]
        mean = shares.sum(1) / mask.sum(1)[:, None]
        return jnp.sum(gates * weights) + jnp.sum(mean * of_mean)

    to_logits, to_bias = jax.grad(ours, argnums=(0, 1))(logits, bias)
    np.testing.assert_allclose(to_logits, jax.grad(formula)(logits), atol=2e-6)
    np.testing.assert_array_equal(to_bias, 0.0)


@pytest.mark.parametrize(
    ("tokens", "chosen", "experts", "alignment"), [(1, 1, 1, 1), (12, 3, 9, 1), (7, 4, 5, 4), (2, 2, 6, 8)]
)
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 99))
def test_permutation_sorts_every_assignment(tokens, chosen, experts, alignment, seed):
    rng = np.random.default_rng(seed)
    index = rng.integers(0, experts, size=(tokens, chosen)).astype(np.int32)
    x = rng.normal(size=(tokens, 3)).astype(np.float32)
    rows, permutation = pk.permute(jnp.asarray(x), jnp.asarray(index), experts, row_alignment=alignment)
    sizes = np.asarray(permutation.group_sizes)
    counts = np.bincount(index.ravel(), minlength=experts)
    np.testing.assert_array_equal(sizes, -(-counts // alignment) * alignment)
    assert rows.shape[0] >= sizes.sum()
    start = 0
    for e in range(experts):
        members = [t for t in range(tokens) for k in range(chosen) if index[t, k] == e]
        group = np.zeros((sizes[e], 3), np.float32)
        group[: counts[e]] = x[members]
        np.testing.assert_array_equal(rows[start : start + sizes[e]], group)
        start += sizes[e]
    np.testing.assert_array_equal(rows[start:], 0)
    gate = rng.normal(size=(tokens, chosen)).astype(np.float32)
    back = pk.combine(rows, jnp.asarray(gate), permutation)
    np.testing.assert_allclose(back, x * gate.sum(1, keepdims=True), atol=1e-5)


def test_permute_and_combine_gradients():
    rng = np.random.default_rng(2)
    index = jnp.asarray(rng.integers(0, 5, size=(7, 3)), jnp.int32)
    x, out_bar = (jnp.asarray(rng.normal(size=(7, 4)), jnp.float32) for _ in range(2))
    gate = jnp.asarray(rng.normal(size=(7, 3)), jnp.float32)
    scale = jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)

    def ours(x, gate, scale):
        rows, permutation = pk.permute(x, index, 5, row_alignment=4)
        expert = jnp.searchsorted(jnp.cumsum(permutation.group_sizes), jnp.arange(rows.shape[0]), side="right")
        return jnp.sum(pk.combine(jnp.tanh(rows) * scale[jnp.minimum(expert, 4)], gate, permutation) * out_bar)

    def formula(x, gate, scale):
        return jnp.sum(jnp.einsum("tk,tkd->td", gate, jnp.tanh(x)[:, None] * scale[index]) * out_bar)

    for a, b in zip(
        jax.grad(ours, argnums=(0, 1, 2))(x, gate, scale),
        jax.grad(formula, argnums=(0, 1, 2))(x, gate, scale),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"bias": jnp.zeros(7)}, "bias must have shape \\(8,\\)"),
        ({"n_group": 3}, "n_group must divide"),
        ({"topk_group": 2}, "topk_group must be"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok must be"),
        ({"scoring_func": "tanh"}, "scoring_func must be one of"),
        ({"group_score": "mean"}, "group_score must be one of"),
        ({"token_mask": jnp.ones((3,), bool)}, "token_mask must have shape"),
        ({"implementation": "hopper"}, "hopper"),
        ({"implementation": "triton"}, "implementation must be one of"),
    ],
)
def test_wrong_arguments_of_gate_are_named(change, named):
    arguments = {"bias": None, "num_experts_per_tok": 2} | change
    with pytest.raises(ValueError, match=named):
        pk.gate(jnp.zeros((2, 4, 8)), **arguments)


def test_wrong_dtypes_of_gate_are_named():
    with pytest.raises(TypeError, match="logits must be floating-point"):
        pk.gate(jnp.zeros((2, 4, 8), jnp.int32), None, num_experts_per_tok=2)
    with pytest.raises(ValueError, match="implementation 'hopper'"):
        pk.gate(jnp.zeros((2, 4, 8), jnp.bfloat16), None, num_experts_per_tok=2, implementation="hopper")


def test_wrong_arguments_of_permute_and_combine_are_named():
    x, index = jnp.zeros((4, 3)), jnp.zeros((4, 2), jnp.int32)
    with pytest.raises(ValueError, match="expert_index must be"):
        pk.permute(x, index[:3], 5)
    with pytest.raises(TypeError, match="expert_index must hold integers"):
        pk.permute(x, index.astype(jnp.float32), 5)
    with pytest.raises(ValueError, match="row_alignment"):
        pk.permute(x, index, 5, row_alignment=0)
    rows, permutation = pk.permute(x, index, 5)
    with pytest.raises(ValueError, match="gate must be"):
        pk.combine(rows, jnp.zeros((4, 3)), permutation)
    with pytest.raises(ValueError, match="rows must be"):
        pk.combine(rows[:-1], jnp.zeros((4, 2)), permutation)


@pytest.mark.parametrize(("scoring", "normed"), [("sigmoid", True), ("softmax", False)])
def test_gates_of_experts_chosen_elsewhere(scoring: str, normed: bool) -> None:
    """For the gate's own choice they are the gate's, and so is their gradient."""
    logits = jnp.asarray(np.random.default_rng(3).normal(size=(2, 5, 16)), jnp.float32)
    settings = {"scoring_func": scoring, "norm_topk_prob": normed, "routed_scaling_factor": 2.5}
    gates = pk.gate(logits, None, num_experts_per_tok=3, **settings)
    weights = jnp.asarray(np.random.default_rng(4).normal(size=(2, 5, 3)), jnp.float32)
    found, pull = jax.vjp(lambda x: pk.gates_of_experts(x, gates.expert_index, **settings), logits)
    np.testing.assert_allclose(found, gates.gate, rtol=1e-6)
    _, pull_gate = jax.vjp(lambda x: pk.gate(x, None, num_experts_per_tok=3, **settings).gate, logits)
    np.testing.assert_allclose(pull(weights)[0], pull_gate(weights)[0], rtol=1e-5, atol=1e-7)
    # Experts of the same number in another order or of another choice have the gates of their affinities.
    index = jnp.broadcast_to(jnp.asarray([7, 0, 2]), (2, 5, 3))
    scores = jax.nn.sigmoid(logits) if scoring == "sigmoid" else jax.nn.softmax(logits)
    wanted = np.asarray(scores)[..., [7, 0, 2]]
    wanted = 2.5 * (wanted / wanted.sum(-1, keepdims=True) if normed else wanted)
    np.testing.assert_allclose(pk.gates_of_experts(logits, index, **settings), wanted, rtol=1e-6)
