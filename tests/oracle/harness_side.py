"""What lm-evaluation-harness's own backend finds: runs in the oracle's environment, without JAX.

    python harness_side.py CHECKPOINT TASKS CONTEXT NAME...

Loads the checkpoint and its tokenizer with transformers, runs the tasks of folder TASKS, once as texts and once as
chats, and prints one JSON line: for each, the results and the model's answers by task.
"""

from __future__ import annotations

import json
import logging
import sys

import torch
import transformers
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager


def main() -> None:
    folder, tasks, context, *names = sys.argv[1:]
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model.config._experts_implementation = "eager"  # the grouped product wants widths that are multiples of 16 bytes
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    backend = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=int(context))
    found = []
    for chat in (False, True):
        chosen = names[:-1] if chat else names
        results = simple_evaluate(
            backend,
            tasks=list(chosen),
            task_manager=TaskManager(include_path=tasks, include_defaults=False),
            apply_chat_template=chat,
            bootstrap_iters=0,
        )
        answers = {task: [row["resps"] for row in rows] for task, rows in results["samples"].items()}
        found.append({"results": results["results"], "answers": answers})
    print(json.dumps(found, default=str))


if __name__ == "__main__":
    main()
