"""One process of a run of reinforcement learning: `dsv3 grpo` with a reward that random weights can earn."""

from __future__ import annotations

import sys

from dsv3_jax.cli.main import main
from dsv3_jax.post_training import rewards


def digits(prompt: str, completion: str, answer: str) -> float:
    """Returns the share of characters below "@"."""
    return sum(letter < "@" for letter in completion) / 6


if __name__ == "__main__":
    rewards.REWARDS = {**rewards.REWARDS, "digits": digits}
    sys.exit(main(["grpo", *sys.argv[1:]]))
