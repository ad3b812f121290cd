"""Tasks of lm-evaluation-harness on this project's models. Importing this module needs the extra `eval`.

    results = evaluate_tasks(HarnessModel(model, tokenizer), ["my_task"], include_path="tasks/")
    results["results"]["my_task"]["acc,none"]

`HarnessModel` is the harness's interface to a model; it may also be given to `lm_eval.simple_evaluate`.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsv3_jax.data import ChatTemplate, Tokenizer
from dsv3_jax.data.control_tokens import END_THINK, THINK
from dsv3_jax.errors import UserError, reason_of
from dsv3_jax.inference import GREEDY, Engine, EngineConfig, Request, Result, Sampler
from dsv3_jax.model import DeepSeekV3

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table
    from tqdm import tqdm
except ImportError as error:
    raise UserError("tasks need lm-evaluation-harness: pip install 'dsv3-jax[eval]'") from error

MOST_CONTEXT = 4096  # tokens, unless the caller allows more: each running request has a cache of this size
_NEW_TOKENS = 256  # that a task generates if it does not say how many
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_PARTS = ("results", "groups", "group_subtasks", "n-shot", "n-samples", "versions", "higher_is_better")

Scored = tuple[tuple[str, str] | None, list[int], list[int]]
"""A context with its continuation, the same as tokens; as the harness passes them on."""


class HarnessModel(TemplateLM):
    """A model as lm-evaluation-harness sees it: text in; log-likelihoods and text out, batched by the engine.

    Contexts that are too long are cut off at their beginning. Names of control tokens in a context stand for these
    tokens, as in the harness's other models, but not in a message of a chat.
    """

    def __init__(
        self, model: DeepSeekV3, tokenizer: Tokenizer, *, context: int | None = None, batch_size: int = 16
    ) -> None:
        """Makes the engine; each of its programs is compiled when it is first needed.

        Args:
          model: the model.
          tokenizer: its tokenizer.
          context: most tokens that the model is given at a time; its own context, but at most 4,096, if None.
          batch_size: requests that run at a time.

        Raises:
          ConfigError: the context is longer than the model's.
        """
        super().__init__()
        self.max_length = context or min(model.config.max_position_embeddings, MOST_CONTEXT)
        self._text = tokenizer
        self._template = ChatTemplate.of(tokenizer)
        marks = {tokenizer.control_id(name) for name in (THINK, END_THINK)}
        shown = [size > 0 or index in marks for index, size in enumerate(tokenizer.token_bytes)]
        config = EngineConfig(
            max_sequences=batch_size,
            context=self.max_length,
            chunk_sizes=(32, 128),
            chunk_rows=min(batch_size, 4),
            drafts=0,
            top_logprobs=0,
            score_prompts=True,
            compile_at_start=False,
        )
        # Control tokens are no part of an answer, as the harness's other models decode it.
        self._engine = Engine(model, config, to_bytes=lambda ids: tokenizer.to_bytes([i for i in ids if shown[i]]))

    @property
    def eot_token_id(self) -> int:
        """Id of the token that ends a text."""
        return self._text.eos_id

    @property
    def prefix_token_id(self) -> int:
        """Id of the token that a text without a context follows: the published begin token, or as in training here."""
        named = self._text.adds_bos or self._text.settings.bos_token is not None
        return self._text.bos_id if named else self._text.eos_id

    @property
    def tokenizer_name(self) -> str:
        """Digest of the tokenizer, for the harness's cache of requests."""
        return self._text.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Returns the ids of a text, which begin with the begin-of-text token where the model expects it.

        Args:
          add_special_tokens: False leaves that token out.
        """
        if self._template is not None:
            ids = self._template.ids(string)
        else:
            ids = self._text.encode(string, control_tokens=True)
        begins = self._text.adds_bos and add_special_tokens is not False and ids[:1] != [self._text.bos_id]
        return [self._text.bos_id, *ids] if begins else ids

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Returns the text of the model's chat template, or None where it has none."""
        return self._template.text if self._template is not None and chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Returns a chat as text, up to where the model is to answer or to go on with the last message.

        Raises:
          UserError: the model has no chat template, or it refuses the messages.
        """
        if self._template is None:
            raise UserError("the model has no chat template; leave --apply-chat-template out")
        return self._template.render(chat_history, continued=not add_generation_prompt)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Returns for each text its log-likelihood in nats, read in windows of the model's context."""
        windows: list[Scored] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(owner)
        sums = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            sums[owner] += value
        for request, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Returns for each context the text that the model writes, up to a stop string, an end token or a length."""
        wanted = []
        for number, (context, given) in enumerate(request.args for request in requests):
            settings: dict[str, Any] = dict(normalize_gen_kwargs(given, _NEW_TOKENS))
            new = min(settings["max_gen_toks"], self.max_length - 1)
            prompt = self.tok_encode(context)[-(self.max_length - new) :] or [self.eot_token_id]
            wanted.append(
                Request(
                    prompt=tuple(prompt),
                    max_new_tokens=new,
                    sampler=_sampler(settings),
                    seed=number,
                    stop_tokens=self._text.end_ids,
                    stop_strings=tuple(text for text in handle_stop_sequences(settings["until"], eos=None) if text),
                )
            )
        texts = [result.text for result in self._serve(wanted, "texts", disable_tqdm)]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], disable_tqdm: bool = False, **unused: Any
    ) -> list[tuple[float, bool]]:
        """Returns for each continuation its log-likelihood, and whether every token of it is the most likely one."""
        wanted = []
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise UserError(
                    f"a continuation has {len(continuation)} tokens, more than the context of {self.max_length}"
                )
            ids = (*context, *continuation)[-(self.max_length + 1) :]
            if continuation:
                start = len(ids) - len(continuation)
                wanted.append(Request(prompt=ids, max_new_tokens=0, score_from=start))
        results = iter(self._serve(wanted, "log-likelihoods", disable_tqdm))
        answers = []
        for pair, _, continuation in requests:
            scores = next(results).prompt_logprobs if continuation else []
            right = (token == score.top[0][0] for token, score in zip(continuation, scores, strict=True))
            answers.append((float(sum(score.logprob for score in scores)), all(right)))
            if pair is not None:
                self.cache_hook.add_partial("loglikelihood", pair, answers[-1])
        return answers

    def _serve(self, requests: Sequence[Request], what: str, quiet: bool) -> list[Result]:
        """Serves requests to their end, the longest first, so that the prompts read together have similar lengths."""
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index].prompt))
        number = {self._engine.submit(requests[index]): index for index in order}
        results = [Result() for _ in requests]
        with tqdm(total=len(requests), desc=what, disable=quiet or not sys.stderr.isatty()) as bar:
            while self._engine.has_work:
                for output in self._engine.step():
                    results[number[output.request_id]].add(output)
                    bar.update(output.finished is not None)
        return results


def evaluate_tasks(
    model: HarnessModel,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
) -> dict[str, Any]:
    """Runs tasks and returns the harness's results, of which `results` has each metric by the name of the task.

    Args:
      tasks: names of tasks, groups or tags; the harness's own, or those of `include_path`.
      include_path: folder with task files of your own (YAML).
      limit: number of examples of each task; all if None.
      num_fewshot: examples with answers that precede each question; as the task says if None.
      apply_chat_template: give the model chats, by its template.

    Raises:
      UserError: a task does not exist, cannot be loaded, or the model cannot do it.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise UserError(f"{include_path} is no folder; give the folder of your task files")
    results: Any = simple_evaluate(
        model,
        tasks=list(tasks),
        task_manager=_task_manager(tasks, include_path),
        limit=limit,
        num_fewshot=num_fewshot,
        apply_chat_template=apply_chat_template,
        log_samples=False,
    )
    return {name: results[name] for name in _PARTS if name in results}


def describe_tasks(results: dict[str, Any]) -> str:
    """Returns the harness's table of what `evaluate_tasks` returned, with a second one for groups of tasks."""
    return "\n".join(make_table(results, column) for column in ("results", "groups") if results.get(column))


def _task_manager(tasks: Sequence[str], include_path: str | Path | None) -> _Tasks:
    """Returns the tasks of a folder if all are there, else the harness's too, whose thousands of files take seconds."""
    if include_path is not None:
        own = _Tasks(include_path=str(include_path), include_defaults=False)
        if all(own.match_tasks([name]) for name in tasks):
            return own
    return _Tasks(include_path=None if include_path is None else str(include_path))


class _Tasks(TaskManager):
    """The harness's tasks. What goes wrong when one is loaded is an error of one line."""

    def load(self, task_list: Any) -> Any:
        for name in task_list:
            if not self.match_tasks([name]):
                raise UserError(f"the harness has no task {name!r}; `lm_eval ls tasks` lists its own")
        try:
            loaded = super().load(task_list)
        except Exception as error:  # a data set that cannot be fetched, a damaged file, a package that a task needs
            raise UserError(f"cannot load {', '.join(task_list)}: {reason_of(error)}") from error
        unsafe = [name for name, task in loaded["tasks"].items() if getattr(task, "UNSAFE_CODE", False)]
        if unsafe:
            raise UserError(f"{unsafe[0]} runs programs that the model writes, which is not allowed here")
        return loaded


def _sampler(settings: dict[str, Any]) -> Sampler:
    """Returns how a task wants tokens to be chosen.

    Raises:
      UserError: the engine has no such setting.
    """
    unknown = settings.keys() - {"do_sample", "until", "max_gen_toks", *_SAMPLING}
    if unknown:
        raise UserError(f"a task sets {min(unknown)!r} in generation_kwargs, which the engine does not have")
    if not settings["do_sample"]:
        return GREEDY
    given = {name: settings[name] for name in _SAMPLING if settings.get(name) is not None}
    return Sampler(**given)
