"""Task files for lm-evaluation-harness, made here: multiple choice, generation, and the likelihood of whole texts."""

from __future__ import annotations

import json
from pathlib import Path

QUESTIONS = [
    {"question": "def f(x):", "choices": [" return x", " class", " import os and sys"], "answer": 0},
    {"question": "once upon a", "choices": [" time", " tree", "s"], "answer": 1},
    {"question": "Ünï", "choices": ["code", " 数"], "answer": 1},
    {"question": "", "choices": ["yes", "no"], "answer": 0},
]
# The last text is longer than a small model's context.
TEXTS = ["alpha beta gamma", "é", "import this " * 12]

TASKS = {
    "own_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "own_generation": {
        "output_type": "generate_until",
        "doc_to_text": "say {{question}}",  # the harness's own backend cannot start from nothing
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["\n", "e"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
    "own_texts": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
    },
}


def write_tasks(folder: Path) -> Path:
    """Writes the task files and their examples, and returns the folder. (JSON is also YAML.)"""
    folder.mkdir(parents=True, exist_ok=True)
    for name, task in TASKS.items():
        rows = [{"text": text} for text in TEXTS] if name == "own_texts" else QUESTIONS
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **source, **task}))
    return folder
