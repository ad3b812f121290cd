"""Problems with answers that a rule can check: generators of them, and files of them.

A generator makes the same problems from the same seed. Training and held-out problems never overlap: which of the two a
problem belongs to follows from its prompt's checksum.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np

from dsv3_jax.errors import UserError
from dsv3_jax.post_training.rewards import REWARDS, evaluate_expression

Split = Literal["train", "held-out"]
_HELD_OUT = 8  # one problem of so many is held out


@dataclasses.dataclass(frozen=True)
class Problem:
    """A prompt, the right answer, and the name of the reward that compares a completion with it."""

    prompt: str
    answer: str
    reward: str


@dataclasses.dataclass(frozen=True)
class TaskSize:
    """How hard generated problems are.

    Attributes:
      operands: numbers in a problem, at most.
      largest: the largest number in a problem.
    """

    operands: int = 3
    largest: int = 20

    def __post_init__(self) -> None:
        if not 2 <= self.operands <= 8 or not 2 <= self.largest <= 10**9:
            raise UserError(
                f"problems need 2 to 8 operands of 2 to 1,000,000,000, not {self.operands} and {self.largest}"
            )


def arithmetic(random: np.random.Generator, size: TaskSize) -> Problem:
    """Returns a sum, difference or product of several numbers, such as "7 + 3 * 12 = "."""
    count = int(random.integers(2, size.operands + 1))
    numbers = [str(x) for x in random.integers(0, size.largest + 1, count)]
    signs = random.choice(["+", "-", "*"], count - 1).tolist()
    text = numbers[0] + "".join(f" {sign} {number}" for sign, number in zip(signs, numbers[1:], strict=True))
    return Problem(f"{text} = ", _value(text), "numeric")


def countdown(random: np.random.Generator, size: TaskSize) -> Problem:
    """Returns the task of reaching a target from given numbers by +, - and *; it always has a solution."""
    numbers = random.integers(1, size.largest + 1, int(random.integers(2, size.operands + 1))).tolist()
    text = str(numbers[0])
    for number in numbers[1:]:
        text = f"({text}) {random.choice(['+', '-', '*'])} {number}"
    target = int(_value(text))
    shown = random.permutation(numbers).tolist()
    prompt = f"Use each of {', '.join(map(str, shown))} at most once, with + - * /, to make {target}: "
    return Problem(prompt, json.dumps({"numbers": shown, "target": target}), "countdown")


def linear_equation(random: np.random.Generator, size: TaskSize) -> Problem:
    """Returns an equation a x + b = c with a whole solution."""
    a, x, b = (int(random.integers(low, size.largest + 1)) for low in (1, -size.largest, 0))
    return Problem(f"Solve {a} * x + {b} = {a * x + b}. x = ", str(x), "numeric")


_FUNCTIONS: Mapping[str, Callable[[int], Callable[[int], int]]] = MappingProxyType(
    {
        "{n} times x": lambda n: lambda x: n * x,
        "x plus {n}": lambda n: lambda x: x + n,
        "the remainder of x divided by {n}": lambda n: lambda x: x % n,
        "the larger of x and {n}": lambda n: lambda x: max(x, n),
        "x to the power of 2, minus {n}": lambda n: lambda x: x * x - n,
        "the sum of all whole numbers from 1 to x, plus {n}": lambda n: lambda x: x * (x + 1) // 2 + n,
    }
)


def code(random: np.random.Generator, size: TaskSize) -> Problem:
    """Returns the task of writing a small Python function, with calls that test it."""
    text = list(_FUNCTIONS)[int(random.integers(len(_FUNCTIONS)))]
    n = int(random.integers(2, size.largest + 1))
    function = _FUNCTIONS[text](n)
    calls = [[[x], function(x)] for x in random.integers(0, size.largest + 1, 5).tolist()]
    prompt = f"Write a Python function f(x) that returns {text.format(n=n)}.\n"
    return Problem(prompt, json.dumps({"function": "f", "calls": calls}), "unit-tests")


TASKS: Mapping[str, Callable[[np.random.Generator, TaskSize], Problem]] = MappingProxyType(
    {"arithmetic": arithmetic, "countdown": countdown, "linear-equation": linear_equation, "code": code}
)


def generate_problems(task: str, split: Split, seed: int, size: TaskSize | None = None) -> Iterator[Problem]:
    """Yields problems of a task without end; those of the two splits have no prompt in common.

    Raises:
      UserError: there is no such task.
    """
    if task not in TASKS:
        raise UserError(f"there is no task '{task}'; choose of {', '.join(TASKS)}, or give a file of problems")
    random = np.random.default_rng([seed, zlib.crc32(task.encode())])
    size = TaskSize() if size is None else size
    while True:
        problem = TASKS[task](random, size)
        if split_of(problem.prompt) == split:
            yield problem


class ProblemSource:
    """The problems of a run: of a generated task, or of a file whose problems are shuffled anew for every epoch.

    Args:
      task: the name of a task, or the path of a file of problems.
      seed: of the problems or their order.
      size: how hard generated problems are.

    Raises:
      UserError: there is no such task or file, or all problems of a file are in the same split.
    """

    def __init__(self, task: str, seed: int, size: TaskSize | None = None):
        self._task, self._seed, self._size = task, seed, size
        self._files: dict[Split, list[Problem]] = {}
        if task not in TASKS:
            if not Path(task).is_file():
                raise UserError(f"there is no task or file '{task}'; choose of {', '.join(TASKS)}, or give a file")
            problems = read_problems(Path(task))
            for split in ("train", "held-out"):
                self._files[split] = [problem for problem in problems if split_of(problem.prompt) == split]
                if not self._files[split]:
                    raise UserError(
                        f"{task} has too few problems: none of its {len(problems)} is for {split}; add some"
                    )

    def training(self, first: int) -> Iterator[Problem]:
        """Yields problems to train on without end, from number `first` on."""
        if not self._files:
            return itertools.islice(generate_problems(self._task, "train", self._seed, self._size), first, None)
        return itertools.islice(self._shuffled(self._files["train"]), first, None)

    def held_out(self, count: int) -> list[Problem]:
        """Returns up to `count` different problems that are never trained on."""
        if self._files:
            return self._files["held-out"][:count]
        return distinct(generate_problems(self._task, "held-out", self._seed, self._size), count)

    def _shuffled(self, problems: list[Problem]) -> Iterator[Problem]:
        for epoch in itertools.count():
            for index in np.random.default_rng([self._seed, epoch]).permutation(len(problems)).tolist():
                yield problems[index]


def distinct(problems: Iterator[Problem], count: int) -> list[Problem]:
    """Returns up to `count` problems with different prompts; a small task has few, and the search for more ends."""
    tries = itertools.islice(problems, 20 * count)
    return list({problem.prompt: problem for problem in tries}.values())[:count]


def split_of(prompt: str) -> Split:
    """Returns the split that a prompt belongs to, whatever the seed."""
    return "train" if zlib.crc32(prompt.encode()) % _HELD_OUT else "held-out"


def read_problems(path: Path) -> list[Problem]:
    """Reads JSON lines with the fields `prompt`, `answer` and `reward`.

    Raises:
      UserError: the file cannot be read, or a line is not such a problem; the line is named.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read problems from {path}: {error}") from error
    problems = [_read_problem(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not problems:
        raise UserError(f"{path} holds no problems; each line is a JSON object with prompt, answer and reward")
    return problems


def _read_problem(line: str, where: str) -> Problem:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{where} must be an object with prompt, answer and reward")
    for name in ("prompt", "answer", "reward"):
        if not isinstance(value.get(name), str):
            raise UserError(f"{where}: '{name}' must be a string")
    if value["reward"] not in REWARDS:
        raise UserError(f"{where}: there is no reward '{value['reward']}'; choose of {', '.join(REWARDS)}")
    return Problem(value["prompt"], value["answer"], value["reward"])


def _value(text: str) -> str:
    evaluated = evaluate_expression(text)
    assert evaluated is not None
    return str(evaluated[0])
