"""Lists all checks. It imports no jax, since the parent process reads it."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Check:
    """A group of cases that run in one process.

    Attributes:
      name: unique.
      module: module beside this one, with a generator function `cases(tiny, **arguments)` that yields `cases.Case`s.
      arguments: passed to it; JSON.
      limit: seconds that the process may take, waiting for the device included.
      case_limit: seconds that one case may take before it waits for the device, with the device, and after.
      clusters: kernels may run in clusters, so that failed cases are run again without.
      kernels: a rehearsal on a CPU interprets the kernels; without, it runs their references.
    """

    name: str
    module: str
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    limit: float = 200
    case_limit: float = 40
    clusters: bool = False
    kernels: bool = True

    @property
    def timed(self) -> bool:
        return self.name.startswith(("timing", "training"))


SMOKE = (Check("smoke", "smoke", limit=60),)

CORRECTNESS = (
    *(
        Check(f"quantise {dtype}{', powers of two' * powers}", "quantise_checks", {"dtype": dtype, "powers": powers})
        for dtype in ("bfloat16", "float32")
        for powers in (False, True)
    ),
    *(
        Check(f"{what}, cluster {cluster}", module, {"form": form, "cluster": cluster})
        for cluster in (1, 2)
        for what, module, form in (
            ("dense FP8", "dense_checks", "product"),
            ("weight gradient FP8", "dense_checks", "weight gradient"),
            ("grouped FP8", "grouped_checks", "fp8"),
            ("grouped bf16", "grouped_checks", "bf16"),
        )
    ),
    Check("dense FP8, ragged", "dense_checks", {"form": "ragged"}, clusters=True),
    Check("grouped, public functions", "grouped_checks", {"form": "public"}, clusters=True),
    *(Check(f"rows {dtype}", "routing_checks", {"form": dtype}) for dtype in ("bfloat16", "float32")),
    Check("gates", "routing_checks", {"form": "gates"}, limit=400, case_limit=60),
    Check("gradients", "gradient_checks", clusters=True),
    *(Check(f"attention {form}", "attention_checks", {"form": form}) for form in ("forward", "gradients", "decode")),
)

TIMING = (
    Check("timing, ceilings", "product_timing", {"form": "ceilings"}, limit=400, case_limit=60),
    *(
        Check(f"timing, {form}", module, {"form": form}, limit=400, case_limit=60)
        for module, forms in (
            ("product_timing", ("dense", "weight gradient", "grouped", "grouped depth", "masked")),
            ("memory_timing", ("quantise", "rows", "gate")),
        )
        for form in forms
    ),
    Check("timing, torch", "torch_timing", limit=400, case_limit=60),
    *(
        Check(f"timing, attention {form}", "attention_timing", {"form": form}, limit=400, case_limit=60)
        for form in ("forward", "backward", "torch")
    ),
)

TRAINING = tuple(
    Check(
        f"training {precision}",
        "training_checks",
        {"precision": precision, "batch": 16, "micro_batch": 8, "rematerialisation": "products"},
        limit=400,
        case_limit=260,
        kernels=False,
    )
    for precision in ("fp8", "bfloat16")  # FP8 first: its program compiles longest
)

# Checks of several commands run together, after the smoke check. Training is first, since its programs compile longest.
COMMANDS = {"smoke": SMOKE, "training": TRAINING, "correctness": CORRECTNESS, "timing": TIMING}
