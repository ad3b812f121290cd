"""Completions with their scores as readable text."""

from __future__ import annotations

from dsv3_jax.post_training.rollouts import Rollout
from dsv3_jax.terminal import printable

_PROBLEMS = 8  # of a page


def sample_page(rollout: Rollout, step: int) -> str:
    """Returns the first problems of a rollout with all their completions and scores, as text."""
    lines = [f"completions of step {step}: {min(_PROBLEMS, len(rollout.problems))} of {len(rollout.problems)} problems"]
    for problem, group in list(zip(rollout.problems, rollout.groups, strict=True))[:_PROBLEMS]:
        lines += ["", "=" * 80, f"prompt: {printable(problem.prompt)}", f"answer: {printable(problem.answer)}"]
        for row in group:
            scores = ", ".join(f"{name} {value:g}" for name, value in row.scores.items())
            cut = ", cut" if row.cut else ""
            lines += ["-" * 80, f"[{scores}; {len(row.ids)} tokens{cut}]", printable(row.text)]
    return "\n".join(lines) + "\n"
