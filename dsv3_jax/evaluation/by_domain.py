"""Bits per byte by domain of the text and by position in the context, and how much domains share their experts."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from dsv3_jax.data import Document, Tokenizer
from dsv3_jax.errors import UserError
from dsv3_jax.model import DeepSeekV3

_MOST_DOMAINS = 12
OTHERS = "(others)"
"""The domain of documents whose own domain is not one of the largest."""


@dataclasses.dataclass(frozen=True)
class DomainResults:
    """How well a model predicts the texts of each domain, and which experts it uses for them.

    Attributes:
      domains: names, the domain with most bytes first.
      bytes: bytes of the targets of each domain.
      bits_per_byte: of each domain.
      positions: first position in the context of each group of positions: 0, 1, 2, 4, 8 ...
      by_position: bits per byte of each group of positions, over all domains.
      load: tokens that each expert gets, int64 [domains, layers, E]; layers are those with experts, MTP modules last.
    """

    domains: tuple[str, ...]
    bytes: tuple[int, ...]
    bits_per_byte: tuple[float, ...]
    positions: tuple[int, ...]
    by_position: tuple[float, ...]
    load: Int[np.ndarray, "domains layers E"]

    @property
    def overlap(self) -> Float[np.ndarray, "domains domains"]:
        """The share of expert use that two domains have in common: sum_i min(share_i, share_i'), mean over layers.

        1 where both spread their tokens over the experts in the same way, or where there are no experts; 0 where they
        use different experts.
        """
        if not self.load.shape[1]:
            return np.ones((len(self.domains), len(self.domains)))
        shares = self.load / np.maximum(self.load.sum(-1, keepdims=True), 1)
        return np.minimum(shares[:, None], shares[None]).sum(-1).mean(-1)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return dataclasses.asdict(self) | {"load": self.load.tolist(), "overlap": self.overlap.tolist()}

    def describe(self) -> str:
        """Returns the results as tables."""
        width = max(map(len, (*self.domains, "domain")))
        lines = [f"{'domain':{width}}  {'bytes':>10}  bits per byte  experts shared with each domain"]
        for name, size, bits, row in zip(self.domains, self.bytes, self.bits_per_byte, self.overlap, strict=True):
            shared = " ".join(f"{share:4.2f}" for share in row)
            lines.append(f"{name:{width}}  {size:>10,}  {bits:>13.4f}  {shared}")
        lines.append("position in the context and bits per byte from there on:")
        ends = [*(first - 1 for first in self.positions[1:]), None]
        groups = zip(self.positions, ends, self.by_position, strict=True)
        named = ((f"{first}+" if end is None else f"{first}-{end}", bits) for first, end, bits in groups)
        lines.append("  ".join(f"{name}: {bits:.3f}" for name, bits in named))
        return "\n".join(lines)


def evaluate_domains(
    model: DeepSeekV3,
    tokenizer: Tokenizer,
    documents: Iterable[Document],
    *,
    length: int,
    most_rows: int,
    begins_rows: bool = False,
    chunk: int = 8192,
) -> DomainResults:
    """Evaluates a model on the documents of each domain, joined end to end and cut into rows.

    Args:
      documents: the texts; those beyond `most_rows` rows of a domain are not read.
      length: T, number of targets of a row.
      most_rows: largest number of rows of a domain.
      begins_rows: the begin-of-text token takes the place of the first input of each row, as published models expect.
      chunk: number of tokens whose logits are computed at a time.

    Raises:
      UserError: no domain has enough text for one row.
    """
    ids = _ids_by_domain(tokenizer, documents, length * most_rows + 1)
    rows = {name: _rows(np.array(part, np.int32), length) for name, part in ids.items() if len(part) > length}
    if not rows:
        raise UserError(f"no domain of the held-out text fills a row of {length} tokens; give more text")
    token_bytes, evaluated = np.asarray(tokenizer.token_bytes), _compiled(chunk)
    bits: dict[str, np.ndarray] = {}
    sizes: dict[str, np.ndarray] = {}
    load: dict[str, np.ndarray] = {}
    for name, tokens in rows.items():
        inputs = tokens[:, :-1].copy()
        if begins_rows:
            inputs[:, 0] = tokenizer.bos_id
        pairs = zip(inputs[:, None], tokens[:, None, 1:], strict=True)
        found = [jax.device_get(evaluated(model, *map(jnp.asarray, pair))) for pair in pairs]
        bits[name] = np.sum([nats for nats, _ in found], axis=0, dtype=np.float64) / math.log(2)
        load[name] = np.sum([each for _, each in found], axis=0, dtype=np.int64)
        sizes[name] = token_bytes[tokens[:, 1:]].sum(axis=0)
    names = sorted(rows, key=lambda name: (name == OTHERS, -sizes[name].sum()))
    firsts = [0, *(2**power for power in range(length.bit_length()) if 2**power < length)]
    all_bits, all_sizes = (np.sum(list(each.values()), axis=0) for each in (bits, sizes))
    return DomainResults(
        domains=tuple(names),
        bytes=tuple(int(sizes[name].sum()) for name in names),
        bits_per_byte=tuple(float(bits[name].sum() / max(sizes[name].sum(), 1)) for name in names),
        positions=tuple(firsts),
        by_position=tuple(
            (np.add.reduceat(all_bits, firsts) / np.maximum(np.add.reduceat(all_sizes, firsts), 1)).tolist()
        ),
        load=np.stack([load[name] for name in names]),
    )


def _ids_by_domain(tokenizer: Tokenizer, documents: Iterable[Document], most: int) -> dict[str, list[int]]:
    """Returns the ids of each domain's documents, each ended by the end-of-text id, `most` of them at the most."""
    ids: dict[str, list[int]] = defaultdict(list)
    for document in documents:
        if len(ids[document.domain]) < most:
            ids[document.domain] += [*tokenizer.encode(document.text), tokenizer.eos_id]
    names = sorted(ids, key=lambda name: -len(ids[name]))
    kept = {name: ids[name][:most] for name in names[:_MOST_DOMAINS]}
    if rest := [index for name in names[_MOST_DOMAINS:] for index in ids[name]]:
        kept[OTHERS] = rest[:most]
    return kept


def _rows(ids: Int[np.ndarray, " N"], length: int) -> Int[np.ndarray, "rows T_plus_1"]:
    """Returns rows that start T ids apart; what does not fill a last one is left out."""
    starts = np.arange((len(ids) - 1) // length) * length
    return ids[starts[:, None] + np.arange(length + 1)]


def _compiled(chunk: int) -> Any:
    """Returns a function from the model, a row of inputs and its targets, [1, T] each, to nats [T] and load."""

    @nnx.jit
    def evaluated(
        model: DeepSeekV3, inputs: Int[Array, "1 T"], targets: Int[Array, "1 T"]
    ) -> tuple[Float[Array, " T"], Int[Array, "layers E"]]:
        features = model.features(inputs)
        hidden = features.hidden[0]
        nats = []
        for start in range(0, hidden.shape[0], chunk):
            logits = model.head(hidden[None, start : start + chunk])[0]
            chosen = jnp.take_along_axis(logits, targets[0, start : start + chunk, None], axis=-1)[:, 0]
            nats.append(jax.nn.logsumexp(logits, axis=-1) - chosen)
        load = jnp.zeros((0, 0), jnp.int32) if features.routing is None else features.routing.load
        return jnp.concatenate(nats), load

    return evaluated
