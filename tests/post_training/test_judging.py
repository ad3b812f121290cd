"""Checks judges: what they read, how their verdicts are counted, and that their rewards can be repeated."""

from __future__ import annotations

import dataclasses

import pytest
from small_models import small_model
from small_runs import small_run

from dsv3_jax.data import Tokenizer
from dsv3_jax.data.tokenizer_training import byte_tokenizer
from dsv3_jax.errors import ConfigError
from dsv3_jax.inference import Engine, EngineConfig, Request, Result
from dsv3_jax.post_training.judging import Judge, judgement_prompt, share_of_yes
from dsv3_jax.post_training.rewards import JudgeConfig, Reward


@pytest.mark.parametrize(
    ("verdicts", "share"),
    [
        (["yes", "no", "no", "No, it is not"], 0.25),
        (["Yes. no", "it is YES", "nobody knows", ""], 1.0),
        (["eyes", "none"], 0.5),
        ([], 0.5),
    ],
)
def test_the_first_yes_or_no_of_a_verdict_counts(verdicts: list[str], share: float) -> None:
    assert share_of_yes(verdicts) == share


def test_a_judge_reads_the_constitution_and_votes_are_counted() -> None:
    tokenizer = Tokenizer(byte_tokenizer())
    asked: list[str] = []

    class Voter:
        """Says yes to a good answer three times in four."""

        def run(self, requests: list[Request]) -> list[Result]:
            results = []
            for number, request in enumerate(requests):
                text = tokenizer.decode(request.prompt)
                asked.append(text)
                good = "good one" in text and number % 4
                results.append(dataclasses.replace(Result(), tokens=tokenizer.encode("yes" if good else "no")))
            return results

    judge = Judge(Voter(), tokenizer, "Be short.", 4)  # pyright: ignore[reportArgumentType]
    items = [("2 + 3? ", "good one", "5"), ("2 + 3? ", "a bad one", "5"), ("2 + 3? ", "good one", "6")]
    assert judge(items) == [0.75, 0.0, 0.75]
    assert len(asked) == 8, "equal texts are judged once"
    assert asked[0].endswith(judgement_prompt("Be short.", "2 + 3? ", "good one"))
    assert asked[0].count("Be short.\nProblem: 2 + 3? \nAnswer: good one\n") == 1


@pytest.mark.slow
def test_a_judge_repeats_itself() -> None:
    run = small_run()
    engine = Engine(small_model(run.model, 0), EngineConfig(max_sequences=4, drafts=0, context=96))
    tokenizer = Tokenizer(byte_tokenizer())
    engine_results = [
        Judge(engine, tokenizer, "Good.", 3, max_new_tokens=4)([("a", "b", ""), ("a", text, "")]) for text in "cd"
    ]
    assert engine_results[0][0] == engine_results[1][0]
    assert all(0 <= share <= 1 for each in engine_results for share in each)


def test_names_of_models_in_rewards() -> None:
    reward = Reward.of("numeric+0.5*judge:self").with_models(lambda name: lambda items: [0.25] * len(items))
    assert reward.score("1 + 1 = ", "\\boxed{2}", "2") == {"numeric": 1.0, "judge:self": 0.25, "reward": 1.125}
    for bad in ("judge:", "judge", "modell:x"):
        with pytest.raises(ConfigError, match="there is no reward"):
            Reward.of(bad)
    with pytest.raises(ConfigError, match="votes"):
        JudgeConfig(votes=0)
