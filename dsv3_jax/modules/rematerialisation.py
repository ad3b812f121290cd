"""What the backward pass recomputes instead of keeping (report section 3.2.3), as policies with names."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

import jax

from dsv3_jax.errors import ConfigError
from dsv3_jax.precision.keeping import KEPT

# None: keep everything. The report's policy names what it keeps: a policy that names what it drops keeps the unnamed
# value that each name was given to, and drops nothing.
_POLICIES: dict[str, Callable[..., Any] | None] = {
    "none": None,
    "report": jax.checkpoint_policies.save_only_these_names(KEPT),
    "products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}

REMATERIALISATIONS = tuple(_POLICIES)
"""none: everything is kept.  report: RMSNorm and SwiGLU outputs, MLA up-projections and the attention core are
recomputed; the latents, attention's output, expert products and the router's logits are kept.
products: only results of weight products are kept.  full: only each block's input is kept."""


def rematerialise(function: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """`function` under the named policy.

    Raises:
      ConfigError: no policy has that name.
    """
    if policy not in _POLICIES:
        near = difflib.get_close_matches(policy, _POLICIES, n=1) or [", ".join(_POLICIES)]
        raise ConfigError(f"rematerialisation '{policy}' does not exist; choose {near[0]}")
    if policy == "none":
        return function
    # Inside a scanned layer the loop itself keeps XLA from merging the recomputation away.
    return jax.checkpoint(function, policy=_POLICIES[policy], prevent_cse=False)
