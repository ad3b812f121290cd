"""Text generation: the engine, sampling, self-speculation with the MTP module, and simple functions on top."""

from dsv3_jax.inference.device_sets import DeviceSets
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.engine_config import EngineConfig
from dsv3_jax.inference.generate import complete, generate, stream
from dsv3_jax.inference.requests import Output, Request, Result, TokenLogprobs
from dsv3_jax.inference.sampling import DEFAULT, GREEDY, Sampler

__all__ = [
    "DEFAULT",
    "GREEDY",
    "DeviceSets",
    "Engine",
    "EngineConfig",
    "Output",
    "Request",
    "Result",
    "Sampler",
    "TokenLogprobs",
    "complete",
    "generate",
    "stream",
]
