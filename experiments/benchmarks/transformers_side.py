"""Runs the PyTorch side of vs_transformers.py and serving.py: answers requests, both as JSON lines.

It needs torch and transformers but nothing of this project. A request is {"do": NAME, ...}: `versions` answers the
library versions, `prepare` builds and compiles a model and answers the seconds of its first run, `round` runs it
several times and answers the seconds of each run, `continuous` answers what is wrong with continuous batching, and
`forget` drops all models.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DynamicCache, GenerationConfig


def build_model(config: dict[str, Any], dtype: str) -> DeepseekV3ForCausalLM:
    """Returns a randomly initialised model with the library's own choice of attention and expert kernels."""
    torch.manual_seed(0)
    return DeepseekV3ForCausalLM(DeepseekV3Config(**config)).to(getattr(torch, dtype))


def random_ids(vocab_size: int, batch: int, length: int) -> torch.Tensor:
    """Returns random tokens [batch, length]."""
    return torch.randint(0, vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))


def training_step(request: dict[str, Any]) -> Callable[[], float]:
    """Returns a function that runs forward pass, backward pass and AdamW on one fixed batch and returns the loss."""
    model = build_model(request["config"], request["dtype"]).train()
    run = torch.compile(model) if request["compile"] else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    ids = random_ids(request["config"]["vocab_size"], request["batch"], request["length"] + 1)
    inputs, targets = ids[:, :-1], ids[:, 1:].reshape(-1)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        logits = run(inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def prefill(request: dict[str, Any]) -> Callable[[], float]:
    """Returns a function that reads a prompt into a new cache and computes the logits of its last position."""
    model = build_model(request["config"], request["dtype"]).eval()
    run = torch.compile(model) if request["compile"] else model
    ids = random_ids(request["config"]["vocab_size"], request["batch"], request["length"])

    @torch.inference_mode()
    def step() -> float:
        output = run(ids, use_cache=True, past_key_values=DynamicCache(config=model.config), logits_to_keep=1)
        return output.logits.sum().item()

    return step


def decoding(request: dict[str, Any]) -> Callable[[], float]:
    """Returns a function that generates greedily token by token with the library's cache, without its `generate`."""
    model = build_model(request["config"], request["dtype"]).eval()
    ids = random_ids(request["config"]["vocab_size"], request["batch"], request["length"])

    @torch.inference_mode()
    def step() -> float:
        cache = DynamicCache(config=model.config)
        token = ids
        for _ in range(request["new_tokens"]):
            output = model(token, use_cache=True, past_key_values=cache, logits_to_keep=1)
            token = output.logits[:, -1:].argmax(-1)
        return token.sum().item()

    return step


def serving(request: dict[str, Any]) -> Callable[[], float]:
    """Returns a function that calls `generate` on batches of requests, in order, with prompts padded on the left.

    A batch runs until its longest request ends.
    """
    model = build_model(request["config"], request["dtype"]).eval()
    ids = random_ids(request["config"]["vocab_size"], len(request["prompts"]), max(request["prompts"]))
    batches = []
    for start in range(0, len(request["prompts"]), request["batch"]):
        lengths = request["prompts"][start : start + request["batch"]]
        width = max(lengths)
        tokens, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width)
        for row, length in enumerate(lengths):
            tokens[row, width - length :] = ids[start + row, :length]
            mask[row, width - length :] = 1
        batches.append((tokens, mask, max(request["new_tokens"][start : start + request["batch"]])))

    @torch.inference_mode()
    def run() -> float:
        for tokens, mask, new in batches:
            options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
            model.generate(tokens, attention_mask=mask, **options)
        return 0.0

    return run


def continuous(request: dict[str, Any]) -> str:
    """Returns what is wrong when the library's continuous batching serves a short prompt; nothing if it can."""
    model = build_model(request["config"], request["dtype"]).eval()
    settings = GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=-1, pad_token_id=0)
    try:
        answers = model.generate_batch([[1, 2, 3]], generation_config=settings, progress_bar=False)
    except Exception as error:  # whatever it is, it is the answer
        return f"{type(error).__name__}: {error}"
    return next((str(each.error) for each in answers.values() if not each.generated_tokens), "")


TASKS = {"train": training_step, "prefill": prefill, "decode": decoding, "serve": serving}


def prepare(request: dict[str, Any]) -> tuple[Callable[[], float], float]:
    """Returns the step of a task, after two runs that compile it and warm it up, and the seconds of the first."""
    torch.compiler.reset()
    start = time.perf_counter()
    step = TASKS[request["task"]](request)
    step()
    seconds = time.perf_counter() - start
    step()
    return step, seconds


def timed(step: Callable[[], float], repeats: int) -> list[float]:
    """Returns the seconds of each of `repeats` runs."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return seconds


def main() -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    transformers.logging.set_verbosity_error()
    # Compilers print to stdout, so the answers go to a private copy of it.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    steps: dict[str, Callable[[], float]] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "versions":
            answer = {"torch": torch.__version__, "transformers": transformers.__version__}
        elif request["do"] == "prepare":
            steps[request["name"]], seconds = prepare(request)
            answer = {"seconds": seconds}
        elif request["do"] == "round":
            answer = {"seconds": timed(steps[request["name"]], request["repeats"])}
        elif request["do"] == "continuous":
            answer = {"error": continuous(request)}
        else:
            steps.clear()
            answer = {}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
