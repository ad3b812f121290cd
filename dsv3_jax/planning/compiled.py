"""What the compiler makes of a plan, from a process of its own; and that beside the paper's figures."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from dsv3_jax.errors import UserError
from dsv3_jax.planning.collectives import Collective
from dsv3_jax.planning.config import PlanConfig
from dsv3_jax.planning.request import to_json

_CHANGE_COMPILATION = ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")  # variables that a plan must not feel
_TIMEOUT = 1800  # seconds; the 671B step for 2,048 devices takes one to five minutes


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledPlan:
    """The compiler's figures, bytes on one device.

    Attributes:
      argument_bytes: state and batch.   output_bytes: the new state and the metrics, of which `alias_bytes` take the
        place of arguments.   temporary_bytes: everything between.   code_bytes: the program.
      peak_bytes: the most that is held at one time, as far as the compiler says; else their sum.
      collectives: all that the program has.
      lower_seconds, compile_seconds, host_peak_bytes: what compiling took on this machine.
    """

    argument_bytes: float
    output_bytes: float
    alias_bytes: float
    temporary_bytes: float
    code_bytes: float
    peak_bytes: float
    collectives: list[Collective]
    lower_seconds: float
    compile_seconds: float
    host_peak_bytes: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


def compile_plan(config: PlanConfig) -> CompiledPlan:
    """Compiles the training step of a plan.

    Raises:
      UserError: the compilers for the target are not installed, or the compiler refuses the program, with its reason.
    """
    command = [sys.executable, "-m", "dsv3_jax.planning.compile_ahead"]
    request = json.dumps(to_json(config))
    try:
        done = subprocess.run(
            command, input=request, capture_output=True, text=True, timeout=_TIMEOUT, env=_environment(), check=False
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"the compiler was stopped after {_TIMEOUT / 60:.0f} minutes; is the machine busy?") from None
    line = done.stdout.strip().splitlines()[-1:] or [""]
    try:
        result = json.loads(line[0])
    except json.JSONDecodeError:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"the compiler stopped: {reason}") from None
    if "error" in result:
        raise UserError(result["error"])
    collectives = [Collective(**values) for values in result.pop("collectives")]
    return CompiledPlan(collectives=collectives, **result)


def _environment() -> dict[str, str]:
    """This process's, with the compilers for absent hardware on the path where `make setup-aot` puts them."""
    package = importlib.util.find_spec("dsv3_jax")
    root = Path(package.origin).parents[1] if package and package.origin else Path()
    places = [Path(sys.prefix) / "aot", root / ".venv" / "aot"]
    path = [*[str(place) for place in places if place.is_dir()][:1], str(root)]
    before = os.environ.get("PYTHONPATH")
    environment = {name: value for name, value in os.environ.items() if name not in _CHANGE_COMPILATION}
    return environment | {"PYTHONPATH": os.pathsep.join(path + ([before] if before else [])), "JAX_PLATFORMS": "cpu"}
