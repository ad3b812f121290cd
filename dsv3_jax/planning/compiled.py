"""Asks the compiler, in a process of its own, what it makes of a plan's training step."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from dsv3_jax.errors import UserError
from dsv3_jax.planning.collectives import Collective
from dsv3_jax.planning.config import PlanConfig
from dsv3_jax.planning.overlap import Span

_CHANGE_COMPILATION = ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")  # they would change what is compiled
_TIMEOUT = 1800  # seconds; the 671B step for 2,048 devices takes one to five minutes


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledPlan:
    """The compiler's figures, bytes on one device.

    Attributes:
      argument_bytes: state and batch.
      output_bytes: the new state and the metrics.
      alias_bytes: those outputs that are written over arguments.
      temporary_bytes: everything else that the step allocates.
      code_bytes: the program.
      peak_bytes: the most that is allocated at one time, where the compiler says it; else the sum.
      collectives: all collectives of the program.
      pair: what a device does when while it computes a layer forward and one backward together, where a pipeline does.
      lower_seconds, compile_seconds, host_peak_bytes: what compiling took on this machine.
    """

    argument_bytes: float
    output_bytes: float
    alias_bytes: float
    temporary_bytes: float
    code_bytes: float
    peak_bytes: float
    collectives: list[Collective]
    pair: list[Span]
    lower_seconds: float
    compile_seconds: float
    host_peak_bytes: float

    def as_dict(self) -> dict[str, Any]:
        """Returns plain values, for JSON."""
        return dataclasses.asdict(self)


def compile_plan(config: PlanConfig) -> CompiledPlan:
    """Returns what the compiler makes of a plan's training step.

    Raises:
      UserError: the compilers for the target are not installed, or the compiler refuses the step, with its reason.
    """
    command = [sys.executable, "-m", "dsv3_jax.planning.compile_ahead"]
    request = json.dumps(config.to_json())
    with tempfile.TemporaryDirectory(prefix="dsv3-plan-") as scratch:
        try:
            done = subprocess.run(
                command,
                input=request,
                capture_output=True,
                text=True,
                timeout=_TIMEOUT,
                env=_environment(scratch),
                check=False,
            )
        except subprocess.TimeoutExpired:
            minutes = f"{_TIMEOUT / 60:.0f} minutes"
            raise UserError(f"the compiler was stopped after {minutes}; is the machine busy?") from None
    result = _answer_of(done)
    if "error" in result:
        raise UserError(result["error"])
    collectives = [Collective(**values) for values in result.pop("collectives")]
    pair = [Span(**values) for values in result.pop("pair")]
    return CompiledPlan(collectives=collectives, pair=pair, **result)


def _answer_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """Returns the JSON object that the process printed last, or how it ended."""
    try:
        return json.loads((done.stdout.strip().splitlines() or [""])[-1])
    except json.JSONDecodeError:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        how = f"by signal {-done.returncode}" if done.returncode < 0 else f"with exit code {done.returncode}"
        return {"error": f"the compiler's process ended {how} (is there enough memory?): {last}"}


def _environment(scratch: str) -> dict[str, str]:
    """Returns this process's environment, with the compilers for absent hardware that `make setup-aot` installs.

    Args:
      scratch: the folder for the compilers' temporary files and logs.
    """
    package = importlib.util.find_spec("dsv3_jax")
    root = Path(package.origin).parents[1] if package and package.origin else Path()
    places = [Path(sys.prefix) / "aot", root / ".venv" / "aot"]
    path = [*[str(place) for place in places if place.is_dir()][:1], str(root)]
    before = os.environ.get("PYTHONPATH")
    environment = {name: value for name, value in os.environ.items() if name not in _CHANGE_COMPILATION}
    return environment | {
        "PYTHONPATH": os.pathsep.join(path + ([before] if before else [])),
        "JAX_PLATFORMS": "cpu",
        "TMPDIR": scratch,
        "TPU_LOG_DIR": scratch,
    }
