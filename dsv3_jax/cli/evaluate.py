"""The command `dsv3 eval`."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dsv3_jax.bounds import LARGEST_COUNT, check_bounds
from dsv3_jax.cli.options import notes, parse
from dsv3_jax.errors import ConfigError, UserError
from dsv3_jax.terminal import say

if TYPE_CHECKING:
    from dsv3_jax.data import Data
    from dsv3_jax.runs.checkpoints import LoadedRun

_DESCRIPTION = """Evaluate the newest checkpoint of the run in folder RUN on its validation set, or on tasks.

Prints the loss (nats per token) and the bits per byte of the main head and the MTP head, and the fraction of MTP drafts
that are accepted: the positions where the MTP head's most likely token is also the main head's, one token later.

With --tasks, prints the table of lm-evaluation-harness instead (extra eval). RUN may then also be a folder in the
published layout. Task files of your own are found in the folder --include-path.

Examples:
  dsv3 eval runs/nano
  dsv3 eval runs/nano --corpus ~/other-texts
  dsv3 eval runs/nano --details runs/nano/details
  dsv3 eval ~/moonlight --tasks arc_easy,hellaswag --limit 100 --dtype bfloat16
"""

_SWITCHES = ("--json", "--apply-chat-template")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """The options of `dsv3 eval`.

    Attributes:
      corpus: a file or folder of texts to evaluate on, of which the run's fraction is held out; the run's own corpus if
        not given.
      step: step of the checkpoint; the newest if not given.
      dtype: dtype of the weights in memory; bfloat16 takes half of the memory.
      details: folder that details.json and details.png are written to: bits per byte by domain and by position in the
        context, the experts that each two domains share, and the drafts accepted by depth and position when texts are
        continued. Tables are printed too. With --tasks, tasks.json.
      tasks: names of tasks of lm-evaluation-harness, with commas between them.
      include_path: folder with task files of your own (YAML).
      limit: largest number of examples of each task; all if not given.
      num_fewshot: answered examples that precede each question; as each task says if not given.
      apply_chat_template: give the model the tasks' questions as chats.
      json: print the result as JSON.
    """

    corpus: str | None = None
    step: int | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    details: str = ""
    tasks: str = ""
    include_path: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    json: bool = False

    def __post_init__(self) -> None:
        bounds = {"step": (0, 10**18), "limit": (1, LARGEST_COUNT), "num_fewshot": (0, LARGEST_COUNT)}
        check_bounds(self, {name: bound for name, bound in bounds.items() if getattr(self, name) is not None}, "--")
        needed = ("include_path", "limit", "num_fewshot", "apply_chat_template")
        given = [name for name in needed if getattr(self, name) not in (None, False)]
        if self.tasks and self.corpus is not None:
            raise ConfigError("--corpus is for the validation set; leave it out with --tasks")
        if given and not self.tasks:
            raise ConfigError(f"--{given[0].replace('_', '-')} is for tasks; name them with --tasks")


def main(argv: list[str]) -> int:
    """Evaluates a run and returns the exit code.

    Args:
      argv: the run's folder, and options.
    """
    positional, flags = _divided(argv)
    options = parse(flags, prog="dsv3 eval RUN", description=_DESCRIPTION, default=EvaluateOptions())
    if len(positional) != 1:
        raise UserError("give one run folder, such as: dsv3 eval runs/nano")
    from dsv3_jax.cli.compilation_cache import keep_compiled_programs
    from dsv3_jax.runs.evaluation import evaluate_loaded, load_run_with_data

    path = Path(positional[0])
    if options.tasks:
        return _tasks(path, options)
    keep_compiled_programs()
    with notes():
        loaded, data = load_run_with_data(path, options.corpus, step=options.step, dtype=options.dtype)
    step, result = loaded.saved.position.step, evaluate_loaded(loaded, data)
    if options.json:
        import json

        print(json.dumps({"step": step, **dataclasses.asdict(result)}))
    else:
        print(f"step {step}: {result.describe()}")
        print(result.describe_baselines())
    if options.details:
        said = _details(loaded, data, Path(options.details), f"{path.name}, step {step}")
        say(said, to=sys.stderr if options.json else sys.stdout)
    return 0


def _details(loaded: LoadedRun, data: Data, folder: Path, title: str) -> str:
    """Writes results by domain, position and depth of draft as JSON and as a picture, and returns them as tables."""
    import json

    from dsv3_jax.evaluation.by_domain import evaluate_domains
    from dsv3_jax.evaluation.domain_drafts import measure_domains
    from dsv3_jax.evaluation.picture import draw_domains
    from dsv3_jax.runs.folder import write_atomically, writing

    results = evaluate_domains(
        loaded.model,
        data.tokenizer,
        data.documents("validation"),
        length=data.config.sequence_length,
        most_rows=data.config.validation_sequences,
        begins_rows=data.begins_rows,
        chunk=loaded.saved.config.training.loss_chunk,
    )
    drafts = measure_domains(loaded.model, data.tokenizer, data.documents("validation"), results.domains)
    numbers = results.to_dict() | ({} if drafts is None else {"drafts": drafts.to_dict()})
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "details.json", json.dumps(numbers) + "\n")
    write_atomically(folder / "details.png", draw_domains(results, drafts, title))
    tables = "\n".join(part.describe() for part in (results, drafts) if part is not None)
    return f"{tables}\nwritten to {folder}: details.json, details.png"


def _tasks(folder: Path, options: EvaluateOptions) -> int:
    """Runs tasks of lm-evaluation-harness, prints their table or JSON, writes tasks.json; returns the exit code."""
    import json

    from dsv3_jax.cli.models import load_model
    from dsv3_jax.evaluation.harness import HarnessModel, describe_tasks, evaluate_tasks
    from dsv3_jax.runs.folder import write_atomically, writing

    names = [name.strip() for name in options.tasks.split(",") if name.strip()]
    if not names:
        raise UserError("--tasks has no names; name at least one task")
    loaded = load_model(folder, options.dtype, options.step)
    results = evaluate_tasks(
        HarnessModel(loaded.model, loaded.tokenizer),
        names,
        include_path=options.include_path,
        limit=options.limit,
        num_fewshot=options.num_fewshot,
        apply_chat_template=options.apply_chat_template,
    )
    text = json.dumps({"model": loaded.note, **results}, default=str)
    if options.details:
        with writing(Path(options.details)):
            Path(options.details).mkdir(parents=True, exist_ok=True)
        write_atomically(Path(options.details) / "tasks.json", text + "\n")
    print(text if options.json else f"{loaded.note}\n{describe_tasks(results)}")
    return 0


def _divided(argv: list[str]) -> tuple[list[str], list[str]]:
    """Returns the words that are no options, and the options with their values."""
    positional, flags = [], []
    words = iter(argv)
    for word in words:
        if not word.startswith("-"):
            positional.append(word)
        else:
            flags += [word, *itertools.islice(words, 0 if word in _SWITCHES or "=" in word else 1)]
    return positional, flags
