"""How many drafts are accepted when a model continues the texts of each domain."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from dsv3_jax.data import Document, Tokenizer
from dsv3_jax.evaluation.acceptance import DraftCounts, measure_acceptance
from dsv3_jax.evaluation.by_domain import OTHERS
from dsv3_jax.inference import Engine, EngineConfig, Request
from dsv3_jax.model import DeepSeekV3

_DEPTHS = 2  # drafts of each step; the MTP module that was trained for one drafts the second too


@dataclasses.dataclass(frozen=True)
class DomainDrafts:
    """The drafts of each domain's continuations, which all have the same length.

    Attributes:
      domains: names.
      counts: the counts of each.
    """

    domains: tuple[str, ...]
    counts: tuple[DraftCounts, ...]

    @property
    def total(self) -> DraftCounts:
        """The counts of all domains together."""
        longest = max(len(each.offered) for each in self.counts)

        def together(arrays: Iterable[np.ndarray]) -> np.ndarray:
            return sum(np.pad(array, ((0, longest - len(array)), (0, 0))) for array in arrays)  # pyright: ignore[reportReturnType]

        return DraftCounts(
            together(each.offered for each in self.counts), together(each.accepted for each in self.counts)
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON: the counts of each domain."""
        return {name: each.to_dict() for name, each in zip(self.domains, self.counts, strict=True)}

    def describe(self) -> str:
        """Returns the accepted shares as tables: by domain and depth, and by position and depth."""
        total = self.total
        width = max(map(len, (*self.domains, "drafts accepted")))
        depths = range(1, total.offered.shape[1] + 1)
        lines = [f"{'drafts accepted':{width}}" + "".join(f"  depth {depth}" for depth in depths) + "  tokens a step"]
        for name, each in (*zip(self.domains, self.counts, strict=True), ("all", total)):
            shares = "".join(f"  {_shown(share):>7}" for share in each.by_depth)
            lines.append(f"{name:{width}}{shares}  {each.tokens_per_step:13.2f}")
        firsts, shares = total.groups_of_positions()
        lines.append("position in the answer and drafts accepted from there on, by depth:")
        lines.append(
            "  ".join(f"{first}: {'/'.join(map(_shown, row))}" for first, row in zip(firsts, shares, strict=True))
        )
        return "\n".join(lines)


def measure_domains(
    model: DeepSeekV3,
    tokenizer: Tokenizer,
    documents: Iterable[Document],
    domains: Sequence[str],
    *,
    texts: int = 8,
    prompt: int = 32,
    new_tokens: int = 64,
) -> DomainDrafts | None:
    """Lets a model continue the beginnings of documents greedily, with two drafts a step, and counts the drafts.

    Args:
      documents: the texts; those of domains that are not named belong to the domain "(others)".
      domains: the domains to measure; one without a document of `prompt` tokens is left out.
      texts: most documents of a domain.
      prompt: number of tokens of a document that the model reads; a quarter of its context if that is less.
      new_tokens: number of tokens that it writes at most; half of its context if that is less.

    Returns:
      The counts, or None if the model cannot draft or no domain has a long enough document.
    """
    if not (model.config.num_nextn_predict_layers and model.config.mtp_hidden_after_final_norm):
        return None
    context = model.config.max_position_embeddings
    prompt, new_tokens = max(min(prompt, context // 4), 1), max(min(new_tokens, context // 2), 1)
    prompts: dict[str, list[tuple[int, ...]]] = {name: [] for name in domains}
    for document in documents:
        found = prompts.get(document.domain if document.domain in prompts else OTHERS)
        if found is not None and len(found) < texts:
            ids = tokenizer.prompt_ids(document.text, control_tokens=False)[:prompt]
            found += [tuple(ids)] if len(ids) == prompt else []
    engine = Engine(
        model,
        EngineConfig(
            max_sequences=texts,
            context=prompt + new_tokens,
            chunk_sizes=(prompt,),
            drafts=_DEPTHS,
            top_logprobs=0,
            reuse_prefixes=False,
            compile_at_start=False,
        ),
    )

    def measured(found: list[tuple[int, ...]]) -> DraftCounts:
        stops = tokenizer.end_ids
        requests = (Request(prompt=ids, max_new_tokens=new_tokens, stop_tokens=stops) for ids in found)
        return measure_acceptance(engine, requests)

    counts = {name: measured(found) for name, found in prompts.items() if found}
    return DomainDrafts(tuple(counts), tuple(counts.values())) if counts else None


def _shown(share: float) -> str:
    return "-" if math.isnan(share) else f"{share:.2f}"
