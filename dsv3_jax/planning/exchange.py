"""The exchange of tokens with their experts on a plan's mesh, as `sharding.expert_parallel` makes it."""

from __future__ import annotations

import dataclasses
import math

from dsv3_jax.planning.config import PlanConfig
from dsv3_jax.precision.dispatch import dispatch_formats
from dsv3_jax.sharding.expert_layout import HopRanks, hops_between, pieces_of, rows_of_block, rows_per_sender
from pallas_kernels import TILE

_FLOAT32 = 4  # bytes
_FORWARD_PASSES, _BACKWARD_PASSES = {False: 10, True: 9}, {False: 20, True: 15}
"""How often the program that XLA makes for the report's mesh reads or writes an array as large as its receive buffers.

The keys say whether rows are sent in FP8, which stay in that format until they are multiplied. Passes are copies of
rows for each receiver, quantization, and sums of results; a backward pass does more of each. Arrays are counted by
their bytes in the compute dtype. A test compares the numbers for FP8 with the time line of the compiled program.
"""
_ADDED_UP = 1  # the sum of weights' gradients is set to zero; the product of all pieces adds to it
_SUMS = 4  # of weight gradients in memory, besides the layer's own; the compiler keeps those of seldom loops apart
_LAID_OUT = 2  # bytes of a weight as the loop over pieces reads it: in bfloat16, or in FP8 in both orders
_HELD = {False: 5, True: 4}
"""Arrays as large as the receive buffers in a stage of the backward pass: rows, gradients, and what was sent."""


@dataclasses.dataclass(frozen=True)
class TokenExchange:
    """The exchange of one layer and micro-batch on a rank.

    Attributes:
      pieces: the tokens of a rank are divided into so many.
      tokens: tokens of a piece.
      hops: the exchanges, in their order.
      rows: for every hop the rows of its receive buffer.
      filled: for every hop the part of its receive buffer that an even load fills.
      product: rows of a product of experts.
      width: bytes of a row.
      weights: number of weights of the experts of a rank.
      in_fp8: whether rows are sent in FP8.
    """

    pieces: int
    tokens: int
    hops: tuple[HopRanks, ...]
    rows: tuple[int, ...]
    filled: tuple[float, ...]
    product: int
    width: float
    weights: float
    in_fp8: bool

    @classmethod
    def of(cls, config: PlanConfig) -> TokenExchange:
        """Returns the exchange of a plan; without hops where every rank has all experts."""
        model, mesh, chosen = config.model, config.mesh, config.model.num_experts_per_tok
        hops = hops_between(mesh.expert, model.n_group, model.topk_group)
        pieces = pieces_of(config.tokens_per_pass, len(hops)) if hops else 1
        tokens = config.tokens_per_pass // pieces
        most, filled, copies = rows_per_sender(hops, tokens, chosen), [], 1
        for hop, rows in zip(hops, most, strict=True):
            copies = min(copies * hop.copies(chosen), chosen)
            filled.append(tokens * copies / (hop.peers * rows))
        experts = model.n_routed_experts // mesh.expert
        return cls(
            pieces=pieces,
            tokens=tokens,
            hops=hops,
            rows=tuple(hop.peers * rows for hop, rows in zip(hops, most, strict=True)),
            filled=tuple(filled),
            product=rows_of_block(tokens * chosen, experts, TILE) + TILE,
            width=model.hidden_size * config.recipe.dtype.itemsize,
            weights=3 * experts * model.hidden_size * model.moe_intermediate_size / mesh.tensor,
            in_fp8=dispatch_formats(config.recipe.fp8)[0] is not None,
        )

    def memory(self, inner: float) -> float:
        """Returns the bytes of two pieces' rows and gradients in every stage, and of what experts compute of one piece.

        To these are added the operands of the weights' gradients of all pieces, and gradients of weights: of all
        pieces, and sums over blocks and rounds; and the weights as products read them.

        Args:
          inner: bytes of an expert's intermediate numbers of a row.
        """
        computed = self.product * (2 * self.width + 3 * inner)
        rows = _HELD[self.in_fp8] * math.fsum(self.rows) * self.width + computed
        operands = self.pieces * computed / (2 if self.in_fp8 else 1)
        return 2 * rows + operands + (_SUMS * _FLOAT32 + _LAID_OUT) * self.weights

    def moved(self, *, backward: bool) -> float:
        """Returns the bytes that passes over receive buffers and over the sum of weight gradients read and write."""
        if not self.hops:
            return 0.0
        passes = (_BACKWARD_PASSES if backward else _FORWARD_PASSES)[self.in_fp8]
        sums = _ADDED_UP * _FLOAT32 * self.weights if backward else 0.0
        return self.pieces * passes * math.fsum(self.rows) * self.width + sums
