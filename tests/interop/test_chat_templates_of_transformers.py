"""Against transformers: the same template gives the same text, token ids and assistant's tokens."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from dsv3_jax.data import ChatTemplate, Tokenizer, plain_template
from dsv3_jax.data.control_tokens import BEGIN_OF_TEXT, END_OF_TEXT, PADDING
from dsv3_jax.data.tokenizer_training import byte_tokenizer

pytestmark = pytest.mark.oracle
ROOT = Path(__file__).parents[2]

# `generation` marks the assistant's tokens for transformers; we find them without it.
MARKED = """{{ bos_token }}{% for m in messages %}
  {%- if m['role'] == 'assistant' %}
    {{- '<｜Assistant｜>' }}{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}
  {%- else %}{{ '<｜User｜>' + m['content'] | trim }}{{ m | tojson if m['role'] == 'tool' }}
  {%- endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"""
CHATS = [
    [{"role": "user", "content": " Né?\n"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<b>漢"}],
    [{"role": r, "content": c} for r, c in (("system", "S"), ("user", "1"), ("assistant", "2"), ("user", "3"))],
    [{"role": r, "content": c} for r, c in (("user", "1"), ("assistant", ""), ("user", "3"), ("assistant", "4\n"))],
]
PROGRAM = """
import json, sys
from transformers import PreTrainedTokenizerFast
task = json.load(open(sys.argv[1], encoding="utf-8"))
tokenizer = PreTrainedTokenizerFast(tokenizer_file=task["file"], **task["names"])
answers = []
for template in task["templates"]:
    for chat in task["chats"]:
        call = dict(chat_template=template, return_dict=True)
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, **call)["input_ids"]
        whole = tokenizer.apply_chat_template(chat, return_assistant_tokens_mask="endgeneration" in template, **call)
        answers.append([prompt, whole["input_ids"], whole.get("assistant_masks")])
print(json.dumps(answers))
"""


def test_ids_and_masks(tmp_path: Path) -> None:
    python = os.environ.get("DSV3_ORACLE_PYTHON") or str(ROOT / ".venv-oracle" / "bin" / "python")
    if not Path(python).exists():
        pytest.skip("no torch and transformers: run `make test-oracle`, or set DSV3_ORACLE_PYTHON")
    tokenizer = Tokenizer(byte_tokenizer())
    tokenizer.save(tmp_path)
    task = {
        "file": str(tmp_path / "tokenizer.json"),
        "names": {"bos_token": BEGIN_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": PADDING},
        "templates": [MARKED, plain_template(tokenizer)],
        "chats": CHATS,
    }
    (tmp_path / "task.json").write_text(json.dumps(task), encoding="utf-8")
    done = subprocess.run(
        [python, "-c", PROGRAM, str(tmp_path / "task.json")], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = iter(json.loads(done.stdout.splitlines()[-1]))
    for text in task["templates"]:
        template = ChatTemplate(text, tokenizer)
        for chat in CHATS:
            prompt, ids, mask = next(answers)
            assert template.prompt(chat) == prompt
            tokens = template.encode(chat)
            assert tokens.ids == ids
            if mask is not None:
                assert [int(own) for own in tokens.from_assistant] == mask
