"""Named policies of what the backward pass recomputes instead of keeping it (report section 3.2.3)."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any, Literal

import jax

from dsv3_jax.errors import ConfigError
from dsv3_jax.precision.keeping import KEPT

# None keeps everything. The report's policy names what it keeps: a policy that names what it drops would still keep the
# unnamed value that each name was given to.
_POLICIES: dict[str, Callable[..., Any] | None] = {
    "none": None,
    "report": jax.checkpoint_policies.save_only_these_names(KEPT),
    "products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}

Rematerialisation = Literal["none", "report", "products", "full"]
REMATERIALISATIONS = tuple(_POLICIES)
"""The policies.

none: everything is kept.  report: RMSNorm and SwiGLU outputs and MLA up-projections are recomputed; the latents, the
attention's output, expert products and the router's logits are kept. Attention that no kernel computes runs again, too.
products: only the results of products with weights are kept.  full: only each block's input is kept.
"""


def rematerialise(function: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """Returns `function` with the named policy applied to its backward pass.

    Raises:
      ConfigError: no policy has that name.
    """
    if policy not in _POLICIES:
        near = difflib.get_close_matches(policy, _POLICIES, n=1) or [", ".join(_POLICIES)]
        raise ConfigError(f"rematerialisation '{policy}' does not exist; choose {near[0]}")
    if policy == "none":
        return function
    # Inside a scanned layer the loop itself keeps XLA from merging the recomputation with the first computation.
    return jax.checkpoint(function, policy=_POLICIES[policy], prevent_cse=False)
