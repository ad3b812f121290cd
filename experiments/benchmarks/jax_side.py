"""Runs this project's side of vs_transformers.py and serving.py, and answers the same requests as transformers_side.py.

It also answers `startup`: the seconds that tracing, lowering and compiling the training step take; and `rates`: the
operations per second of a large product in each dtype, and the bytes per second of a copy.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax

from dsv3_jax import DeepSeekV3, ModelConfig, Precision, default_run, generate, load_checkpoint
from dsv3_jax.inference import GREEDY, Engine, EngineConfig, Request
from dsv3_jax.runs.checkpoints import abstract_state, make_model
from dsv3_jax.training.config import TrainingConfig
from dsv3_jax.training.losses import cross_entropies
from dsv3_jax.training.step import StepSettings, make_train_step

_LINES = (
    "def read(path):\n    with open(path) as file:\n",
    "class Queue:\n    def __init__(self, maxsize=0):\n",
    "import os\nimport sys\n\n\ndef main():\n",
    "    if not isinstance(value, str):\n        raise TypeError(",
)


def random_ids(vocab_size: int, batch: int, length: int) -> jax.Array:
    """Returns random tokens [batch, length]."""
    return jax.random.randint(jax.random.key(1), (batch, length), 0, vocab_size)


def build_model(config: ModelConfig, dtype: str, *, masters: bool = False) -> DeepSeekV3:
    """Returns a randomly initialised model that computes in `dtype`, and holds its parameters in it or in float32."""
    held = jnp.dtype("float32" if masters else dtype)
    build = nnx.jit(lambda rngs: DeepSeekV3(config, rngs=rngs, precision=Precision.preset(dtype), param_dtype=held))
    return build(nnx.Rngs(0))


def make_step(graph: Any) -> Callable[..., Any]:
    """Returns a pure function that runs forward pass, backward pass and AdamW for the next-token loss."""
    optimizer = optax.adamw(1e-4, b1=0.9, b2=0.95, weight_decay=0.1)

    def step(parameters: Any, rest: Any, moments: Any, ids: jax.Array) -> tuple[Any, Any, jax.Array]:
        def loss(parameters: Any) -> jax.Array:
            model = nnx.merge(graph, parameters, rest)
            hidden = model.features(ids[:, :-1]).hidden
            return cross_entropies(model.head, hidden, ids[:, 1:], TrainingConfig().loss_chunk).mean()

        value, gradients = jax.value_and_grad(loss)(parameters)
        updates, moments = optimizer.update(gradients, moments, parameters)
        return optax.apply_updates(parameters, updates), moments, value

    step.init = optimizer.init
    return step


def training_step(request: dict[str, Any]) -> Callable[[], float]:
    """Returns a function that trains on one fixed batch and returns the loss."""
    model = build_model(ModelConfig.from_dict(request["config"]), request["dtype"], masters=True)
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)
    step = make_step(graph)
    compiled = jax.jit(step, donate_argnums=(0, 2))
    ids = random_ids(model.config.vocab_size, request["batch"], request["length"] + 1)
    state = [parameters, jax.jit(step.init)(parameters)]

    def run() -> float:
        state[0], state[1], loss = compiled(state[0], rest, state[1], ids)
        jax.block_until_ready(state)
        return float(loss)

    return run


def prefill(request: dict[str, Any]) -> Callable[[], float]:
    """Returns a function that reads a prompt into a new cache and computes the logits of its last position."""
    model = build_model(ModelConfig.from_dict(request["config"]), request["dtype"])
    ids = random_ids(model.config.vocab_size, request["batch"], request["length"])
    graph, weights = nnx.split(model)

    @jax.jit
    def read(weights: Any, ids: jax.Array) -> Any:
        model = nnx.merge(graph, weights)
        read = model.prefill(ids, model.init_cache(*ids.shape))
        return model.head(read.hidden[:, -1]), read.cache

    return lambda: float(jax.block_until_ready(read(weights, ids))[0].sum())


def decoding(request: dict[str, Any]) -> Callable[[], float]:
    """Returns a function that calls `dsv3.generate`: it reads the prompt and generates greedily, token by token."""
    model = build_model(ModelConfig.from_dict(request["config"]), request["dtype"])
    ids = random_ids(model.config.vocab_size, request["batch"], request["length"])
    return lambda: float(generate(model, ids, request["new_tokens"], GREEDY)[:, ids.shape[1] :].sum())


def serving(request: dict[str, Any]) -> Callable[[], list[float]]:
    """Returns a function that gives an engine all requests at once.

    It returns the mean and the largest seconds to the first tokens of a request, and the share of drafts accepted.
    The model is a run's, if the request names one; prompts are then the beginnings of a Python file's lines.
    """
    if request.get("run"):
        model, tokenizer, _ = load_checkpoint(request["run"])
        ids = [tokenizer.encode(text) for text in _LINES]
    else:
        config = ModelConfig.from_dict(request["config"])
        model = build_model(config, request["dtype"])
        ids = np.asarray(random_ids(config.vocab_size, len(request["prompts"]), max(request["prompts"]))).tolist()
    sizes = {"context": request["context"], "top_logprobs": 0, "compile_at_start": False}
    engine = Engine(model, EngineConfig(**sizes, reuse_prefixes=False, **request["engine"]))
    requests = [
        Request(prompt=tuple(row[:length]), max_new_tokens=new, sampler=GREEDY)
        for row, length, new in zip(ids, request["prompts"], request["new_tokens"], strict=True)
    ]

    def run() -> list[float]:
        start = time.perf_counter()
        first: dict[int, float] = {}
        drafted, accepted = (sum(counts) for counts in (engine.statistics.drafted, engine.statistics.accepted))
        for each in requests:
            engine.submit(each)
        while engine.has_work:
            for output in engine.step():
                first.setdefault(output.request_id, time.perf_counter() - start)
        drafted = sum(engine.statistics.drafted) - drafted
        accepted = sum(engine.statistics.accepted) - accepted
        return [sum(first.values()) / len(first), max(first.values()), accepted / max(drafted, 1)]

    return run


TASKS = {"train": training_step, "prefill": prefill, "decode": decoding, "serve": serving}


def startup(request: dict[str, Any]) -> dict[str, float]:
    """Returns the seconds to trace and lower the training step of `dsv3 train`, and with `compile` to compile it.

    The step is complete (MTP, balance, running average); nothing is allocated or run.
    """
    run = default_run(request["preset"])
    run = dataclasses.replace(run, model=run.model.replace(**request["overrides"]))
    skeleton, state = abstract_state(run, lambda: make_model(run))
    rows = jax.ShapeDtypeStruct((1, request["batch"], request["length"] + 1), jnp.int32)
    number = jax.ShapeDtypeStruct((), jnp.float32)
    start = time.perf_counter()
    lowered = make_train_step(skeleton, run).lower(state, rows, rows, StepSettings(*[number] * 4))
    seconds = {"lower": time.perf_counter() - start}
    if request["compile"]:
        start = time.perf_counter()
        lowered.compile()
        seconds["compile"] = time.perf_counter() - start
    return seconds


def rates() -> dict[str, float]:
    """Returns the operations per second of a product of 1024 x 1024 matrices, and the bytes per second of a copy."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        matrix = jnp.ones((1024, 1024), dtype)
        multiply = jax.jit(lambda x: lax.dot_general(x, x, (((1,), (1,)), ((), ())), preferred_element_type=x.dtype))
        found[dtype] = 2 * 1024**3 / least_seconds(multiply, matrix)
    numbers = jnp.ones(2**25, jnp.float32)
    return found | {"copy": 2 * numbers.nbytes / least_seconds(jax.jit(lambda x: x + 1), numbers)}


def least_seconds(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> float:
    """Returns the shortest of ten runs, after one that compiles."""
    jax.block_until_ready(function(x))
    return min(timed(lambda: jax.block_until_ready(function(x)), 10)["seconds"])


def prepare(request: dict[str, Any]) -> tuple[Callable[[], Any], float]:
    """Returns the step of a task, after two runs that compile it and warm it up, and the seconds of the first."""
    start = time.perf_counter()
    step = TASKS[request["task"]](request)
    step()
    seconds = time.perf_counter() - start
    step()
    return step, seconds


def timed(step: Callable[[], Any], repeats: int) -> dict[str, list[Any]]:
    """Returns the seconds of each of `repeats` runs, and what each returned."""
    seconds, values = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        values.append(step())
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "values": values}


def main() -> None:
    jax.config.update("jax_enable_compilation_cache", False)
    # Libraries may print to stdout, so the answers go to a private copy of it.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    steps: dict[str, Callable[[], Any]] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "versions":
            answer: dict[str, Any] = {name: version(name) for name in ("jax", "flax", "optax")}
            answer["device"] = jax.devices()[0].device_kind
        elif request["do"] == "startup":
            answer = startup(request)
        elif request["do"] == "rates":
            answer = rates()
        elif request["do"] == "prepare":
            steps[request["name"]], seconds = prepare(request)
            answer = {"seconds": seconds}
        elif request["do"] == "round":
            answer = timed(steps[request["name"]], request["repeats"])
        else:
            steps.clear()
            answer = {}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
