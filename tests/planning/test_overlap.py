"""How much of a schedule's communication is hidden, on programs for which the answer is known by hand."""

from __future__ import annotations

import dataclasses

import pytest

from dsv3_jax.config import ModelConfig
from dsv3_jax.planning.config import PlanConfig
from dsv3_jax.planning.hardware import ACCELERATORS, Target
from dsv3_jax.planning.overlap import EvenLoad, Schedule, Span, even_load
from dsv3_jax.sharding.mesh import MeshConfig

# 1 byte of memory, 2 bytes between nodes or 8 within one, 1000 operations a microsecond.
ACCELERATOR = dataclasses.replace(
    ACCELERATORS["h800"],
    bandwidth=1e6,
    outer_link=2e6,
    inner_link=8e6,
    flops=1e9,
    fp8_flops=2e9,
    flops_reached=1.0,
    fp8_reached=1.0,
    bandwidth_reached=1.0,
    node=2,
)
START = """  %a = f32[100]{0} parameter(0)
  %s = ((f32[100]), f32[400]{0}) all-gather-start(%a), replica_groups={{0,2,4,6}}, dimensions={0}
"""
DONE = """  %d = f32[400]{0} all-gather-done(%s)
"""
SECONDS = 300 * 4 / 2e6  # three quarters of the result come from others


def program(between: str, behind: str = "", others: str = "") -> str:
    """Returns a scheduled module with instructions between a start and its done, and behind it."""
    entry = f"ENTRY %main (a: f32[100]) -> f32[] {{\n{START}{between}{DONE}{behind}}}\n"
    return f"HloModule m, is_scheduled=true\n\n{others}{entry}"


def hidden(text: str, load: EvenLoad | None = None) -> float:
    found = Schedule(text, ACCELERATOR, load).transfers()
    assert found["all-gather", 4].seconds == pytest.approx(SECONDS)
    return found["all-gather", 4].hidden


NEGATED = "  %b = f32[{0}]{{0}} negate(%x)\n"  # writes so many numbers; what it reads is not in the text


def test_what_stands_between_start_and_done_hides() -> None:
    assert hidden(program("")) == 0
    assert hidden(program(NEGATED.format(75))) == pytest.approx(300e-6 / SECONDS)
    assert hidden(program(NEGATED.format(500))) == 1
    assert hidden(program("", NEGATED.format(500))) == 0


def test_operands_are_read() -> None:
    two = "  %b = f32[25]{0} iota()\n  %c = f32[25]{0} negate(%b)\n"
    assert hidden(program(two)) == pytest.approx(200e-6 / SECONDS)


def test_a_product_takes_its_operations() -> None:
    """2 x 10 x 20 x 30 operations at 1000 a microsecond are 12, at 2000 6; 4 x 1100 bytes would take longer."""
    accelerator = dataclasses.replace(ACCELERATOR, bandwidth=1e12)
    factors = "  %l = {0}[10,30]{{1,0}} iota()\n  %r = {0}[30,20]{{1,0}} iota()\n"
    dot = "  %p = f32[10,20]{1,0} dot(%l, %r), lhs_contracting_dims={1}, rhs_contracting_dims={0}\n"
    kernel = (
        '  %p = f32[10,20]{1,0} custom-call(%l, %r), custom_call_target="mosaic_gpu_v2", '
        'metadata={op_name="jit(step)/grouped_matmul/mpmd_map"}\n'
    )
    for dtype, line, seconds in (("f32", dot, 12e-6), ("f32", kernel, 12e-6), ("f8e4m3fn", kernel, 6e-6)):
        found = Schedule(program(factors.format(dtype) + line), accelerator).transfers()["all-gather", 4]
        assert found.hidden == pytest.approx(seconds / SECONDS, rel=1e-3), line
    found = Schedule(program(factors.format("f32") + kernel), accelerator, EvenLoad(products=0.25)).transfers()
    assert found["all-gather", 4].hidden == pytest.approx(3e-6 / SECONDS, rel=1e-3)


@pytest.mark.parametrize(
    ("left", "right", "result"),
    [
        ("30,10", "3,20,10", "30,20"),  # rows, and a matrix for each of three experts
        ("30,10", "30,20", "3,10,20"),  # gradients by three experts' matrices
        ("2,15,10", "2,15,20", "3,10,20"),  # the same of rows in two parts
        ("3,10,10", "3,20,10", "3,10,20"),  # ten rows for each of three experts
    ],
)
def test_operations_of_grouped_products(left: str, right: str, result: str) -> None:
    """Each multiplies 30 rows by a matrix of 10 x 20."""
    lines = f"""  %l = f32[{left}] iota()
  %r = f32[{right}] iota()
  %p = f32[{result}] custom-call(%l, %r), metadata={{op_name="jit(step)/grouped_matmul/mpmd_map"}}
"""
    accelerator = dataclasses.replace(ACCELERATOR, bandwidth=1e12)
    found = Schedule(program(lines), accelerator).transfers()["all-gather", 4]
    assert found.hidden == pytest.approx(2 * 30 * 10 * 20 / 1e9 / SECONDS, rel=1e-2)


def test_loops_conditionals_and_slices_are_read_through() -> None:
    """A loop of three passes, or none; the longer of two branches; of a buffer, the slice that a fusion reads."""
    others = """%one (p: f32[9]) -> f32[9] {
  %p = f32[9]{0} parameter(0)
  ROOT %n = f32[10]{0} negate(%p)
}

%none (p: f32[9]) -> f32[9] {
  ROOT %p = f32[9]{0} parameter(0)
}

%sliced (p: f32[1000], i: s32[]) -> f32[5] {
  %p = f32[1000]{0} parameter(0)
  %i = s32[] parameter(1)
  %t = f32[5]{0} dynamic-slice(%p, %i), dynamic_slice_sizes={5}
  ROOT %n = f32[5]{0} negate(%t)
}

"""
    one = (9 + 10) * 4e-6
    loop = '  %w = f32[9]{0} while(%x), condition=%c, body=%one, backend_config={"known_trip_count":{"n":"3"}}\n'
    assert hidden(program(loop, others=others)) == pytest.approx(3 * one / SECONDS)
    seldom = loop.replace("backend_config", 'metadata={op_name="jit(step)/beyond_an_even_load/while"}, backend_config')
    assert hidden(program(seldom, others=others)) == 0
    branches = "  %w = f32[9]{0} conditional(%i, %x, %x), branch_computations={%none, %one}\n"
    assert hidden(program(branches, others=others)) == pytest.approx(one / SECONDS)
    fusion = """  %big = f32[1000]{0} parameter(1)
  %at = s32[] parameter(2)
  %w = f32[5]{0} fusion(%big, %at), kind=kLoop, calls=%sliced
"""
    assert hidden(program(fusion, others=others)) == pytest.approx((5 + 5 + 1) * 4e-6 / SECONDS)


def test_transfers_over_one_link_follow_one_another() -> None:
    """Two sends of 0.6 ms begin together: 0.9 ms of computation hide one and a half. Another link is free meanwhile."""
    second = START.replace("%s =", "%s2 =").split("\n", 1)[1]
    done = DONE.replace("%d =", "%d2 =").replace("(%s)", "(%s2)")
    found = Schedule(program(second + NEGATED.format(225), done), ACCELERATOR).transfers()["all-gather", 4]
    assert found.seconds == pytest.approx(2 * SECONDS)
    assert found.hidden == pytest.approx(0.75)
    inner = second.replace("{{0,2,4,6}}", "{{0,1}}")
    found = Schedule(program(inner + NEGATED.format(225), done), ACCELERATOR).transfers()
    assert found["all-gather", 4].hidden == found["all-gather", 2].hidden == 1


def test_a_synchronous_collective_hides_nothing_and_is_beside_nothing() -> None:
    text = program("  %e = f32[200]{0} all-gather(%a), replica_groups={{0,1}}, dimensions={0}\n")
    found = Schedule(text, ACCELERATOR).transfers()
    assert found["all-gather", 2].hidden == 0
    assert found["all-gather", 4].hidden == pytest.approx(100 * 4 / 8e6 / SECONDS)


def test_the_filled_part_of_buffers_on_the_reports_mesh() -> None:
    """A token goes to 4 of 8 nodes, and to 8 ranks, for which a half is spare; pieces are of 256 tokens.

    A quarter more rows are multiplied, and for each of 4 experts a tile of 128; a tile has no rows.
    """
    config = PlanConfig(model=ModelConfig.preset("v3-671b"), target=Target.parse("h800:64"), mesh=MeshConfig(expert=64))
    rows = 256 * 8
    assert even_load(config) == EvenLoad(hops=((8, 1 / 2), (1, 2 / 3)), products=rows / (rows * 1.25 + 4 * 128 + 128))


def test_a_time_line_has_every_pass_of_inner_loops() -> None:
    """A pass computes 40 us of attention, then three times 80 us of experts, beside which 0.2 ms are sent."""
    scope = 'metadata={op_name="jit(step)/pairs/while/body/'
    text = f"""HloModule m, is_scheduled=true

%inner (p: f32[20]) -> f32[20] {{
  ROOT %n = f32[20]{{0}} negate(%q), {scope}transpose(jvp())/routed_experts/neg"}}
}}

%pair (p: f32[100]) -> f32[100] {{
  %p = f32[100]{{0}} parameter(0)
  %n = f32[10]{{0}} negate(%q), {scope}attention/neg"}}
  %s = ((f32[100]), f32[200]{{0}}) all-gather-start(%p), replica_groups={{{{0,2}}}}, {scope}attention/gather"}}
  %w = f32[20]{{0}} while(%q), condition=%c, body=%inner, backend_config={{"known_trip_count":{{"n":"3"}}}}
  %d = f32[200]{{0}} all-gather-done(%s)
}}

ENTRY %main (a: f32[100]) -> f32[] {{
  %l = f32[100]{{0}} while(%a), condition=%c, body=%pair, metadata={{op_name="jit(step)/pairs/while"}}
}}
"""
    spans = Schedule(text, ACCELERATOR).timeline("pairs")
    assert [dataclasses.replace(span, start=round(span.start, 9), end=round(span.end, 9)) for span in spans] == [
        Span("between nodes", "attention, forward", 40e-6, 240e-6),
        Span("computation", "attention, forward", 0.0, 40e-6),
        Span("computation", "routed experts, backward", 40e-6, 280e-6),
    ]
    assert Schedule(text, ACCELERATOR).timeline("elsewhere") == []
