"""Rewards (report section 5.2.1): named functions of prompt, completion and the right answer.

A rule gives a number from 0 to 1. `Reward.of("numeric+0.1*format")` adds several rewards, each with a weight.
"model:FOLDER" is the score of a reward model, "judge:FOLDER" the vote of a run and "judge:self" that of the model that
writes; `Reward.with_models` loads them.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import operator
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from types import MappingProxyType

from dsv3_jax.bounds import check_bounds
from dsv3_jax.errors import ConfigError, UserError
from dsv3_jax.post_training.answers import as_number, final_answer, thought_and_answer
from dsv3_jax.post_training.sandbox import call_in_sandbox

RewardFunction = Callable[[str, str, str], float]
"""(prompt, completion, answer) -> reward."""
Item = tuple[str, str, str]
"""(prompt, completion, answer)."""
ModelReward = Callable[[Sequence[Item]], list[float]]
"""A reward that a model gives to many items at a time."""
MODEL_KINDS = ("model", "judge")
"""What a name such as "model:FOLDER" begins with."""


def exact(prompt: str, completion: str, answer: str) -> float:
    """Returns 1 if the completion's final answer is `answer`, letter by letter."""
    return float(final_answer(completion) == answer.strip())


def numeric(prompt: str, completion: str, answer: str) -> float:
    """Returns 1 if the completion's final answer is the same number as `answer`; 1/2, 0.5 and 0.50 are equal."""
    found, wanted = as_number(final_answer(completion) or ""), as_number(answer)
    return float(found is not None and found == wanted)


def mathematics(prompt: str, completion: str, answer: str) -> float:
    """Returns 1 if the final answer equals `answer` as an expression of mathematics, which math-verify decides.

    Raises:
      UserError: the package math-verify is not installed.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise UserError("the reward 'mathematics' needs math-verify: pip install 'dsv3-jax[post-training]'")
    import math_verify  # pyright: ignore[reportMissingImports]

    found = final_answer(completion)
    if found is None:
        return 0.0
    return float(math_verify.verify(math_verify.parse(f"${answer}$"), math_verify.parse(f"${found}$")))


def form(prompt: str, completion: str, answer: str) -> float:
    """Returns 1 if the completion is "<think>...</think> <answer>...</answer>" and nothing else."""
    return float(thought_and_answer(completion) is not None)


def countdown(prompt: str, completion: str, answer: str) -> float:
    """Returns 1 if the final answer computes the target from the given numbers, each used at most once.

    Args:
      answer: JSON, {"numbers": [...], "target": t}.
    """
    task = json.loads(answer)
    evaluated = evaluate_expression(final_answer(completion) or "")
    if evaluated is None:
        return 0.0
    value, used = evaluated
    left = list(task["numbers"])
    for number in used:
        if number not in left:
            return 0.0
        left.remove(number)
    return float(value == task["target"])


def unit_tests(prompt: str, completion: str, answer: str) -> float:
    """Returns the share of calls that the completion's Python answers rightly, run in a sandbox.

    Args:
      answer: JSON, {"function": name, "calls": [[arguments, expected], ...]}.
    """
    task = json.loads(answer)
    calls = task["calls"]
    found = call_in_sandbox(_program(completion), task["function"], [arguments for arguments, _ in calls])
    if not found.answers:
        return 0.0
    return sum(got == expected for got, (_, expected) in zip(found.answers, calls, strict=True)) / len(calls)


REWARDS: Mapping[str, RewardFunction] = MappingProxyType(
    {
        "exact": exact,
        "numeric": numeric,
        "mathematics": mathematics,
        "format": form,
        "countdown": countdown,
        "unit-tests": unit_tests,
    }
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """How a model judges completions.

    Attributes:
      constitution: text that says what is good.
      votes: verdicts on each completion.
    """

    constitution: str = "A good answer is right, complete and short."
    votes: int = 8

    def __post_init__(self) -> None:
        check_bounds(self, {"votes": (1, 10_000)}, "judge.")


@dataclasses.dataclass(frozen=True)
class Reward:
    """A weighted sum of named rewards.

    Attributes:
      parts: (name, weight) pairs.
      models: the rewards of the parts that are models, by name.
    """

    parts: tuple[tuple[str, float], ...]
    models: Mapping[str, ModelReward] = dataclasses.field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, text: str) -> Reward:
        """Reads a sum such as "numeric+0.1*format" or "model:runs/reward".

        Raises:
          ConfigError: a name that no reward has, a weight that is no finite number, or a name twice.
        """
        parts = []
        for term in text.split("+"):
            weight, star, name = term.rpartition("*")
            name = name.strip()
            try:
                number = float(weight) if star else 1.0
            except ValueError:
                raise ConfigError(f"'{weight.strip()}' in the reward '{text}' is no number") from None
            if name not in REWARDS and not _is_model(name):
                models = ", ".join(f"{kind}:FOLDER" for kind in MODEL_KINDS)
                raise ConfigError(f"there is no reward '{name}'; choose of {', '.join(REWARDS)}, {models}")
            if not -1e6 < number < 1e6:
                raise ConfigError(f"the weight of '{name}' in the reward '{text}' must be a finite number")
            parts.append((name, number))
        if len({name for name, _ in parts}) < len(parts):
            raise ConfigError(f"the reward '{text}' names one reward twice")
        return cls(tuple(parts))

    def with_models(self, load: Callable[[str], ModelReward]) -> Reward:
        """Returns the reward with its models loaded; `load` is given names such as "model:runs/reward"."""
        return dataclasses.replace(self, models={name: load(name) for name, _ in self.parts if _is_model(name)})

    def score(self, prompt: str, completion: str, answer: str) -> dict[str, float]:
        """Returns each part's unweighted reward and their weighted sum, under the name "reward"."""
        return self.score_all([(prompt, completion, answer)])[0]

    def score_all(self, items: Sequence[Item]) -> list[dict[str, float]]:
        """Returns, for each item, every part's unweighted reward and their weighted sum, under the name "reward"."""
        columns = {name: self._part(name, items) for name, _ in self.parts}
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        return [{**row, "reward": sum(weight * row[name] for name, weight in self.parts)} for row in rows]

    def _part(self, name: str, items: Sequence[Item]) -> list[float]:
        return self.models[name](items) if name in self.models else [REWARDS[name](*item) for item in items]


def _is_model(name: str) -> bool:
    kind, colon, folder = name.partition(":")
    return bool(colon and folder) and kind in MODEL_KINDS


_OPERATORS: Mapping[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = MappingProxyType(
    {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
)


def evaluate_expression(text: str) -> tuple[Fraction, tuple[int, ...]] | None:
    """Returns the exact value of a sum, difference, product or quotient of whole numbers, and the numbers in it.

    An equation's left side counts. None for anything else, and after a division by zero.
    """

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            used.append(node.value)
            return Fraction(node.value)
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](value(node.left), value(node.right))
        raise ValueError(text)

    used: list[int] = []
    expression = text.partition("=")[0].strip()
    if len(expression) > 200:  # keeps the parser's recursion and the numbers small
        return None
    try:
        return value(ast.parse(expression, mode="eval").body), tuple(used)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _program(completion: str) -> str:
    """Returns the last fenced block of Python in the answer, or the answer itself."""
    text = final_answer(completion) or completion
    fence = text.rpartition("```python")[2] if "```python" in text else text
    return fence.partition("```")[0]
