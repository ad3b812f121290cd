"""Compiles a plan's training step for its cluster, in a process of its own, and prints what the compiler made of it.

    python -m dsv3_jax.planning.compile_ahead < request.json

prints one JSON object: the compiler's figures, or {"error": reason}. It needs the wheels of the extra `aot` on
PYTHONPATH (`make setup-aot`) and JAX_PLATFORMS=cpu.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from typing import Any

from dsv3_jax.errors import UserError
from dsv3_jax.operating_system import peak_memory_bytes
from dsv3_jax.planning import topology
from dsv3_jax.planning.collectives import read_collectives
from dsv3_jax.planning.config import PlanConfig
from dsv3_jax.planning.overlap import Schedule, even_load


def compile_step(config: PlanConfig) -> dict[str, Any]:
    """Lowers and compiles the step; returns seconds, bytes per device and collectives."""
    from dsv3_jax.planning.abstract_step import traced_step

    start = time.perf_counter()
    platform = {"gpu": "cuda", "tpu": "tpu", "cpu": "cpu"}[config.target.accelerator.platform]
    lowered = traced_step(config, topology.devices_of(config.target)).lower(lowering_platforms=(platform,))
    middle = time.perf_counter()
    compiled = _compile(lowered, platform)
    end = time.perf_counter()
    memory = compiled.memory_analysis()
    peak = getattr(memory, "peak_memory_in_bytes", 0)
    together = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    together += memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "lower_seconds": round(middle - start, 1),
        "compile_seconds": round(end - middle, 1),
        "host_peak_bytes": peak_memory_bytes(),
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
        "peak_bytes": peak or together,
        **_communication(config, compiled.as_text()),
    }


def _communication(config: PlanConfig, hlo: str) -> dict[str, Any]:
    """Returns the collectives, with what is hidden of them where the program is in the order in which it runs.

    Also returned is the time line of a layer of a forward and one of a backward pass that a pipeline computes together.
    """
    found, accelerator = read_collectives(hlo), config.target.accelerator
    if accelerator.platform != "gpu":  # a TPU's instructions have units of their own, which the reader does not know
        return {"collectives": [vars(item) for item in found], "pair": []}
    schedule = Schedule(hlo, accelerator, even_load(config))
    hidden = {key: transfers.hidden for key, transfers in schedule.transfers().items()}
    return {
        "collectives": [vars(item) | {"hidden": hidden[item.kind, item.group]} for item in found],
        "pair": [vars(span) for span in schedule.timeline("pairs")],
    }


def _compile(lowered: Any, platform: str) -> Any:
    """Compiles, on GPUs without autotuning if possible.

    Without a GPU nothing can be timed, and yet every candidate kernel would be compiled, which is half of all
    compiling. Some products of small matrices have no kernel but the candidates of autotuning.
    """
    if platform == "cuda":
        with contextlib.suppress(RuntimeError):
            return lowered.compile(compiler_options={"xla_gpu_autotune_level": 0})
    return lowered.compile()


def answer(config: PlanConfig) -> dict[str, Any]:
    """Returns the compiler's figures, or under "error" why there are none."""
    try:
        if reason := topology.why_unavailable(config.target):
            raise UserError(reason)
        topology.prepare(config.target)
        return compile_step(config)
    except UserError as error:
        return {"error": " ".join(str(error).split())}
    except Exception as error:  # whatever the compiler says is the answer
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return {"error": f"the compiler refuses this step: {type(error).__name__}: {(lines or ['no reason'])[0]}"}


def main() -> int:
    """Reads the request and prints the answer."""
    print(json.dumps(answer(PlanConfig.from_json(json.load(sys.stdin)))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
