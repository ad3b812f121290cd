"""Times PyTorch's products and attention on the same machine, for comparison."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

from cases import Case, device_lock

DENSE = ((4096, 2112, 7168), (4096, 24576, 1536), (4096, 32768, 512), (4096, 7168, 16384), (4096, 4096, 7168),
         (4096, 7168, 2048), (64, 2112, 7168), (64, 4096, 7168))  # fmt: skip
ROUNDS = 7


def cases(tiny: bool) -> Iterator[Case]:
    if tiny:
        return
    yield Case("copy: torch", copy)
    yield Case("bf16 product 8192: torch", lambda: bf16_product(8192, 8192, 8192))
    for shape in DENSE:
        name = " x ".join(map(str, shape))
        yield Case(f"{name}: torch FP8, 1x128 by 128x128", lambda shape=shape: scaled_product(*shape, blocks=128))
        yield Case(f"{name}: torch FP8, 1x128 by 1x128", lambda shape=shape: scaled_product(*shape, blocks=1))
        yield Case(f"{name}: torch bf16", lambda shape=shape: bf16_product(*shape))


def copy() -> dict[str, Any]:
    import torch

    sets = [torch.full((1 << 29,), i, dtype=torch.bfloat16, device="cuda") for i in range(2)]
    target = torch.empty_like(sets[0])
    ms, spread = milliseconds([lambda x=x: target.copy_(x) for x in sets])
    return {"passed": True, "ms": ms, "spread": spread, "gb_s": 4e-6 * (1 << 29) / ms}


def bf16_product(m: int, n: int, k: int) -> dict[str, Any]:
    import torch

    sets = [(random(m, k), random(n, k)) for _ in range(number_of_sets(2 * (m * k + n * k + m * n)))]
    ms, spread = milliseconds([lambda x=x, w=w: torch.mm(x, w.T) for x, w in sets])
    return {"passed": True, "ms": ms, "spread": spread, "tflops": 2e-9 * m * n * k / ms}


def scaled_product(m: int, n: int, k: int, blocks: int) -> dict[str, Any]:
    """Times cuBLASLt's FP8 product with one scale per 1x128 tile of the first and per block of the second operand."""
    import torch

    def make():
        a, b = (torch.randn(rows, k, device="cuda").to(torch.float8_e4m3fn) for rows in (m, n))
        # cuBLASLt reads the scales of 1x128 tiles with the rows contiguous.
        scale_a = torch.rand(k // 128, m, device="cuda").T
        if blocks == 1:
            return a, b.T, scale_a, torch.rand(k // 128, n, device="cuda").T.T
        return a, b.T, scale_a, torch.rand(-(-n // 128), k // 128, device="cuda").T

    sets = [make() for _ in range(number_of_sets(m * k + n * k + 2 * m * n))]
    calls = [
        lambda a=a, b=b, sa=sa, sb=sb: torch._scaled_mm(a, b, scale_a=sa, scale_b=sb, out_dtype=torch.bfloat16)
        for a, b, sa, sb in sets
    ]
    ms, spread = milliseconds(calls)
    return {"passed": True, "ms": ms, "spread": spread, "tflops": 2e-9 * m * n * k / ms}


def milliseconds(calls: list[Callable[[], Any]]) -> tuple[float, float]:
    """Returns the median time of one call over rounds that go through all `calls`, by events, and the spread."""
    import torch

    def round_of(count: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(count):
            for call in calls:
                call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / count / len(calls)

    with device_lock():
        return _timed(calls, round_of)


def _timed(calls: list[Callable[[], Any]], round_of: Callable[[int], float]) -> tuple[float, float]:
    round_of(1)
    count = max(1, round(40 / (round_of(1) * len(calls))), -(-20 // len(calls)))
    times = [round_of(count) for _ in range(ROUNDS)]
    median = statistics.median(times)
    return median, (max(times) - min(times)) / median


def number_of_sets(one: int) -> int:
    return max(2, min(16, -(-300_000_000 // one)))


def random(*shape: int):
    import torch

    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
