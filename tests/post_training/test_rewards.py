"""Checks of rewards against answers written by hand, and of generated problems against Python's own arithmetic."""

from __future__ import annotations

import ast
import itertools
import json
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_jax.errors import ConfigError, UserError
from dsv3_jax.post_training import rewards
from dsv3_jax.post_training.answers import as_number, final_answer, thought_and_answer
from dsv3_jax.post_training.rewards import REWARDS, Reward, evaluate_expression
from dsv3_jax.post_training.sandbox import why_unavailable
from dsv3_jax.post_training.tasks import TASKS, TaskSize, generate_problems, read_problems, split_of


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{3}, no: \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} \boxed{2", "1"),
        ("<answer>4</answer> <answer> 5 </answer>", "5"),
        (r"<answer>4</answer> \boxed{6}", "6"),
        ("4", None),
        (r"\boxed{}", ""),
    ],
)
def test_final_answer(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("12", Fraction(12)),
        ("-0.50", Fraction(-1, 2)),
        ("1,234,567", Fraction(1234567)),
        (" 3/4 ", Fraction(3, 4)),
        ("$5", Fraction(5)),
        ("20%", Fraction(20)),
        ("−3", Fraction(-3)),
        ("1/0", None),
        ("1e3", None),
        ("nan", None),
        ("", None),
        ("1 2", None),
        ("9" * 5000, None),
    ],
)
def test_numbers(text: str, number: Fraction | None) -> None:
    assert as_number(text) == number


@pytest.mark.parametrize(
    ("completion", "whole"),
    [
        ("<think>a</think> <answer>b</answer>", True),
        ("\n<think></think><answer></answer>\n", True),
        ("x<think>a</think> <answer>b</answer>", False),
        ("<think>a</think> <answer>b</answer>x", False),
        ("<think>a</think>x<answer>b</answer>", False),
        ("<answer>b</answer> <think>a</think>", False),
        ("<think>a<think>b</think></think> <answer>c</answer>", False),
        ("<think>a</think> <answer>b</answer> <answer>c</answer>", False),
    ],
)
def test_form(completion: str, whole: bool) -> None:
    assert (thought_and_answer(completion) is not None) == whole
    assert REWARDS["format"]("", completion, "") == whole


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("(25 - 5) * 3", 1),
        ("25 * 3 - 5 * 3", 0),  # 3 is used twice
        ("60", 0),
        ("25 + 3", 0),
        ("(25 - 5) * 3 = 60", 1),
        ("25 * 3 / (5 / 5)", 0),
        ("(25 - 5) ** 3", 0),
        ("__import__('os').getpid()", 0),
        ("(" * 5000, 0),
        ("25 / 0", 0),
    ],
)
def test_countdown(text: str, right: int) -> None:
    task = json.dumps({"numbers": [3, 5, 25], "target": 60})
    assert rewards.countdown("", f"<answer>{text}</answer>", task) == right


def test_expressions_are_exact() -> None:
    assert evaluate_expression("1 / 3 + 1 / 6") == (Fraction(1, 2), (1, 3, 1, 6))
    for nothing in ("", "-1", "1.5", "1 if 1 else 2", "x", "True + 1", "9" * 300):
        assert evaluate_expression(nothing) is None, nothing


@pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
def test_unit_tests_give_the_share_of_right_calls() -> None:
    task = json.dumps({"function": "f", "calls": [[[1], 1], [[2], 4], [[3], 9], [[-2], 4]]})
    right = "<think>square</think> <answer>```python\ndef f(x):\n    return x * x\n```</answer>"
    assert rewards.unit_tests("", right, task) == 1
    assert rewards.unit_tests("", "def f(x):\n    return 4", task) == 0.5
    assert rewards.unit_tests("", "def f(x:\n", task) == 0


def test_sums_of_rewards() -> None:
    reward = Reward.of("numeric + 0.25*format")
    found = reward.score("", "<think>.</think><answer>7</answer>", "7.0")
    assert found == {"numeric": 1.0, "format": 1.0, "reward": 1.25}
    assert reward.score("", r"\boxed{7}", "7")["reward"] == 1
    for bad in ("nothing", "x*format", "nan*format", "format+format", ""):
        with pytest.raises(ConfigError):
            Reward.of(bad)


@pytest.mark.parametrize("task", ["arithmetic", "linear-equation"])
def test_answers_of_generated_problems_are_right(task: str) -> None:
    for problem in itertools.islice(generate_problems(task, "train", 3, TaskSize(4, 50)), 50):
        if task == "arithmetic":
            assert eval(compile(ast.parse(problem.prompt.removesuffix("= ").strip(), mode="eval"), "", "eval")) == int(  # noqa: S307
                problem.answer
            )
        else:
            words = problem.prompt.split()
            assert int(words[1]) * int(problem.answer) + int(words[5]) == int(words[7].rstrip("."))


def test_countdown_problems_have_a_solution() -> None:
    for problem in itertools.islice(generate_problems("countdown", "train", 1, TaskSize(3, 9)), 20):
        task = json.loads(problem.answer)
        solved = False
        for order in itertools.permutations(task["numbers"]):
            for signs in itertools.product("+-*", repeat=len(order) - 1):
                text = str(order[0])
                for sign, number in zip(signs, order[1:], strict=True):
                    text = f"({text}) {sign} {number}"
                solved = solved or bool(rewards.countdown("", f"<answer>{text}</answer>", problem.answer))
        assert solved, problem


@pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
def test_code_problems_are_solved_by_their_description() -> None:
    bodies = {
        "times x": "{n} * x",
        "x plus": "x + {n}",
        "remainder": "x % {n}",
        "larger": "x if x > {n} else {n}",
        "power": "x ** 2 - {n}",
        "sum of all": "sum(range(x + 1)) + {n}",
    }
    seen = set()
    for problem in itertools.islice(generate_problems("code", "train", 0), 40):
        kind = next(word for word in bodies if word in problem.prompt)
        if kind in seen:
            continue
        seen.add(kind)
        words = [word.rstrip(".,") for word in problem.prompt.split() if word not in ("1", "2,")]
        n = next(int(word) for word in words if word.isdigit())
        body = bodies[kind].format(n=n)
        assert rewards.unit_tests("", f"def f(x):\n    return {body}", problem.answer) == 1, problem
    assert seen == set(bodies)


@given(seed=st.integers(0, 2**32), task=st.sampled_from(sorted(TASKS)))
def test_splits_never_overlap_and_problems_repeat(seed: int, task: str) -> None:
    for split in ("train", "held-out"):
        first, again = (list(itertools.islice(generate_problems(task, split, seed), 3)) for _ in range(2))
        assert first == again
        assert {split_of(problem.prompt) for problem in first} == {split}


def test_files_of_problems(tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text('{"prompt": "1+1=", "answer": "2", "reward": "numeric"}\n\n', encoding="utf-8")
    (problem,) = read_problems(path)
    assert (problem.prompt, problem.answer, problem.reward) == ("1+1=", "2", "numeric")
    for text, message in (
        ("", "no problems"),
        ("{", "line 1 is not JSON"),
        ("[]", "must be an object"),
        ('{"prompt": 1}', "'prompt' must be a string"),
        ('{"prompt": "a", "answer": "b", "reward": "c"}', "there is no reward 'c'"),
        ("[" * 100_000, "line 1 is not JSON"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=message):
            read_problems(path)
    with pytest.raises(UserError, match="there is no task 'no'"):
        next(generate_problems("no", "train", 0))
