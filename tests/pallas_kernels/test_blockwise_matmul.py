"""Checks the FP8 product against float64 and against its block-by-block definition."""

import jax
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import interpreted_hopper

import pallas_kernels as pk
from pallas_kernels.blockwise_matmul import hopper, tpu
from pallas_kernels.blockwise_matmul.tuning import CLOCK_GHZ, Tiling, choose_tiling, estimated_cycles, tilings
from pallas_kernels.hopper_launch import hopper_target


def operands(m, n, k, b_tile="128x128", seed=0):
    keys = jax.random.split(jax.random.key(seed), 2)
    a = pk.quantize(jax.random.normal(keys[0], (m, k)), tile="1x128")
    return a, pk.quantize(jax.random.normal(keys[1], (n, k)), tile=b_tile)


def float64_product(a, b):
    def plain(q):
        rows, columns = {"1x128": (1, 128), "128x128": (128, 128)}[q.tile]
        scales = np.repeat(np.repeat(np.asarray(q.scales, "f8"), rows, 0), columns, 1)
        return np.asarray(q.values, "f8") * scales[: q.shape[0], : q.shape[1]]

    return plain(a) @ plain(b).T


def by_blocks(a, b, accumulator):
    """Returns the product by its definition: each 128 of K is summed separately in float32, then scaled and added."""
    total = jnp.zeros((a.shape[0], b.shape[0]), jnp.float32)
    b_scales = b.scales if b.tile == "1x128" else jnp.repeat(b.scales, 128, axis=0)[: b.shape[0]]
    for block in range(a.scales.shape[1]):
        left, right = (q.values[:, block * 128 : (block + 1) * 128].astype(jnp.float32) for q in (a, b))
        partial = jnp.dot(left, right.T, precision="highest")
        total += partial * a.scales[:, block, None] * b_scales[None, :, block]
    return total if accumulator is None else accumulator + total


def relative_error(got, wanted):
    return np.linalg.norm(np.asarray(got, "f8") - wanted) / np.linalg.norm(wanted)


@pytest.mark.parametrize(
    ("m", "n", "k", "b_tile"), [(1, 1, 1, "1x128"), (130, 257, 300, "128x128"), (259, 70, 256, "1x128")]
)
def test_equals_float64(m, n, k, b_tile):
    a, b = operands(m, n, k, b_tile)
    wanted = float64_product(a, b)
    assert relative_error(by_blocks(a, b, None), wanted) < 1e-6
    assert relative_error(pk.blockwise_matmul(a, b, out_dtype=jnp.float32), wanted) < 1e-6
    rounded = pk.blockwise_matmul(a, b)
    assert rounded.dtype == jnp.bfloat16
    assert relative_error(rounded, wanted) < 2**-8


def test_adds_to_an_accumulator():
    a, b = operands(70, 90, 256, "1x128")
    accumulator = jax.random.normal(jax.random.key(5), (70, 90)) * 100
    got = pk.blockwise_matmul(a, b, accumulator=accumulator, out_dtype=jnp.float32)
    assert relative_error(got, np.asarray(accumulator, "f8") + float64_product(a, b)) < 1e-6


def test_a_nan_tile_spoils_its_row_alone():
    x = np.ones((3, 256), "f4")
    x[1, 0] = np.inf
    out = pk.blockwise_matmul(
        pk.quantize(jnp.asarray(x), tile="1x128"), pk.quantize(jnp.ones((2, 256)), tile="128x128")
    )
    assert np.isnan(np.asarray(out, "f4")).tolist() == [[False] * 2, [True] * 2, [False] * 2]


# More tiles than blocks, so that the ring of stages continues from tile to tile; edges inside of every tile; a cluster
# whose second block is wholly outside of the matrix; one and two consumers, one and two waves; parts of K of which the
# last ends past it.
HOPPER_CASES = [
    ((128, 128, 256), "128x128", Tiling(stages=2), False),
    ((300, 200, 300), "128x128", Tiling(tile_n=192, stages=2, cluster=2), False),
    ((260, 300, 520), "1x128", Tiling(tile_n=128, stages=3), False),
    ((130, 70, 300), "1x128", Tiling(tile_n=64, stages=2), True),
    ((1, 50, 300), "128x128", Tiling(64, 16, 3, 2, "a"), False),
    ((260, 200, 300), "128x128", Tiling(256, 128, 2, 2, "a"), False),
    ((70, 60, 600), "1x128", Tiling(64, 48, 2, splits=3), True),
]


@pytest.mark.parametrize(("sizes", "b_tile", "tiling", "accumulate"), HOPPER_CASES)
def test_hopper_kernel_equals_the_definition_and_does_not_race(sizes, b_tile, tiling, accumulate):
    m, n, k = sizes
    a, b = operands(m, n, k, b_tile)
    accumulator = jax.random.normal(jax.random.key(9), (m, n)) if accumulate else None
    with interpreted_hopper(num_cores=tiling.cluster) as interpret:
        got = hopper.matmul(a, b, accumulator, jnp.float32, tiling=tiling, interpret=interpret)
        jax.block_until_ready(got)
    wanted = by_blocks(a, b, accumulator)
    assert relative_error(got, np.asarray(wanted, "f8")) < 1e-6


@pytest.mark.parametrize(
    ("sizes", "b_tile", "accumulate"),
    [((128, 128, 256), "128x128", False), ((600, 200, 300), "128x128", False), ((70, 90, 1024), "1x128", True)],
)
def test_tpu_kernel_equals_the_definition(sizes, b_tile, accumulate):
    m, n, k = sizes
    a, b = operands(m, n, k, b_tile)
    accumulator = jax.random.normal(jax.random.key(9), (m, n)) if accumulate else None
    got = tpu.matmul(a, b, accumulator, jnp.float32, interpret=pltpu.InterpretParams())
    assert relative_error(got, np.asarray(by_blocks(a, b, accumulator), "f8")) < 1e-6


@given(st.integers(1, 9000), st.integers(1, 33000), st.integers(1, 20000), st.sampled_from([2, 4]), st.booleans())
@settings(max_examples=50, deadline=None)
def test_every_problem_gets_a_tiling_that_fits(m, n, k, out_bytes, by_column):
    tiling = choose_tiling(m, n, k, out_bytes, by_column, 132)
    assert tiling.fits(out_bytes if tiling.splits == 1 else 4)
    assert tiling in tilings(out_bytes, by_column)


# (M, N, K), the tile and the sharing that DeepGEMM's rules choose on 132 multiprocessors, and the TFLOP/s that it
# publishes for an H800 (of the grouped product and the weight gradient, the middle of what is published).
DEEPGEMM = [
    ((4096, 2112, 7168), Tiling(256, 96, 4, 2, "a"), 1127),
    ((4096, 24576, 1536), Tiling(256, 128, 4, 2, "a"), 1212),
    ((4096, 32768, 512), Tiling(256, 128, 4, 2, "a"), 775),
    ((4096, 7168, 16384), Tiling(256, 128, 4, 2, "a"), 1520),
    ((4096, 4096, 7168), Tiling(256, 128, 4, 2, "a"), 1410),
    ((4096, 7168, 2048), Tiling(256, 128, 4, 2, "a"), 1168),
    ((64, 2112, 7168), Tiling(64, 16, 12), 206),
    ((64, 4096, 7168), Tiling(64, 32, 12), 287),
    ((32768, 4096, 7168), Tiling(128, 160, 4, 2, "a"), 1364),
    ((7168, 4096, 8192), Tiling(128, 144, 4, 2, "a"), 1092),
]


@pytest.mark.parametrize(("sizes", "tiling", "published"), DEEPGEMM)
def test_the_estimate_agrees_with_published_rates(sizes, tiling, published):
    m, n, k = sizes
    gradient = sizes == (7168, 4096, 8192)
    h800 = 2850 / CLOCK_GHZ  # bytes a cycle of 2.85 TB/s copied
    phases = estimated_cycles(tiling, m, n, k, 4 if gradient else 2, gradient, 132, h800)
    rate = 2e-3 * m * n * k * CLOCK_GHZ / sum(phases.values())
    assert abs(rate / published - 1) < 0.15


def test_few_rows_get_narrow_tiles_and_many_get_wide_ones():
    def chosen(m, n, k):
        return choose_tiling(m, n, k, 2, False, 132)

    for m in (1, 16, 64):
        tiling = chosen(m, 2112, 7168)
        assert tiling.tile_m == 64
        assert -(-2112 // tiling.tile_n) * tiling.splits >= 66  # at least half of the multiprocessors work
    assert chosen(1, 2112, 7168).splits > 1
    assert chosen(4096, 24576, 1536).tile_n * chosen(4096, 24576, 1536).tile_m >= 128 * 192


def test_on_hopper_the_kernel_is_chosen_and_sizes_that_fit_are_not_copied():
    """2112 and 1536 are multiples of 32 but not of a tile, so TMA handles the edges; 333 is padded."""

    def program(m, n, k, b_tile):
        operand = jax.eval_shape(lambda x: pk.quantize(x, tile="1x128"), jax.ShapeDtypeStruct((m, k), jnp.float32))
        other = jax.eval_shape(lambda x: pk.quantize(x, tile=b_tile), jax.ShapeDtypeStruct((n, k), jnp.float32))
        with hopper_target():
            return str(jax.make_jaxpr(lambda a, b: pk.blockwise_matmul(a, b))(operand, other))

    for sizes in ((4096, 2112, 7168), (4096, 7168, 2112), (512, 1536, 576)):
        text = program(*sizes, "128x128")
        assert "blockwise_matmul" in text
        assert " pad[" not in text, sizes
    assert " pad[" in program(4096, 333, 7168, "128x128")


def test_impossible_tilings_are_named():
    with pytest.raises(ValueError, match="tile_n must be a multiple of 16 up to 128 with 256 rows"):
        Tiling(256, 144)
    with pytest.raises(ValueError, match="tile_m must be 64, 128 or 256"):
        Tiling(tile_m=192)
    with pytest.raises(ValueError, match="does not fit into shared memory"):
        hopper.matmul(*operands(8, 8, 128), None, jnp.float32, tiling=Tiling(tile_n=192, stages=6))


def test_bad_input_is_named():
    a, b = operands(4, 6, 256)
    with pytest.raises(ValueError, match=r"b must be \[N, 256\] as a is \(4, 256\), not \(6, 128\)"):
        pk.blockwise_matmul(a, operands(4, 6, 128)[1])
    with pytest.raises(ValueError, match="a must be in 1x128 tiles, not 128x128"):
        pk.blockwise_matmul(b, b)
    with pytest.raises(ValueError, match="b must be in 128x128 blocks or 1x128 tiles, not 128x1"):
        pk.blockwise_matmul(a, pk.quantize(jnp.ones((6, 256)), tile="128x1"))
    with pytest.raises(ValueError, match=r"b\.scales must have shape \(1, 2\)"):
        pk.blockwise_matmul(a, pk.Quantized(b.values, b.scales[:, :1], b.tile))
    with pytest.raises(ValueError, match=r"accumulator must have shape \(4, 6\), not \(6, 4\)"):
        pk.blockwise_matmul(a, b, accumulator=jnp.ones((6, 4)))
    with pytest.raises(TypeError, match="accumulator must be float32"):
        pk.blockwise_matmul(a, b, accumulator=jnp.ones((4, 6), jnp.bfloat16))
    with pytest.raises(TypeError, match="out_dtype must be bfloat16 or float32, not float16"):
        pk.blockwise_matmul(a, b, out_dtype=jnp.float16)
    with pytest.raises(ValueError, match="implementation"):
        pk.blockwise_matmul(a, b, implementation="hopper")
    with pytest.raises(TypeError, match="carries no gradient"):
        jax.grad(lambda s: pk.blockwise_matmul(pk.Quantized(a.values, s, "1x128"), b).astype("f4").sum())(a.scales)
