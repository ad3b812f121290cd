"""What the engine is asked for, and what it answers."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import UserError
from dsv3_jax.inference.sampling import GREEDY, Sampler

MOST_STOP_TOKENS = 64
FinishReason = Literal["length", "stop", "cancelled"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to continue.

    Attributes:
      prompt: token ids, at least one.
      max_new_tokens: most tokens to write.
      sampler: how each token is chosen.
      seed: of this request's draws, 0 to 2^64 - 1. With the same seed and prompt the draws are the same in every batch.
      stop_tokens: the text ends when one of these is written; it is the last of the result's tokens.
      stop_strings: the text ends before one of these, wherever tokens begin and end. The engine needs a `to_bytes`.
      top_logprobs: number of most likely tokens to report at each position besides the chosen one; None reports
        no log-probabilities.
      score_from: index, from 1, of the first token of the prompt whose log-probability is reported, up to the prompt's
        end; None reports none. `max_new_tokens` may then be 0. The engine needs `score_prompts`.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int = 64
    sampler: Sampler = GREEDY
    seed: int = 0
    stop_tokens: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    top_logprobs: int | None = None
    score_from: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**64:
            raise UserError(f"seed must be from 0 to 2^64 - 1, not {self.seed}")
        if len(self.stop_tokens) > MOST_STOP_TOKENS:
            raise UserError(f"at most {MOST_STOP_TOKENS} stop tokens can be given, not {len(self.stop_tokens)}")
        if any(not text for text in self.stop_strings):
            raise UserError("a stop string is empty; leave it out")

    def check(self, config: ModelConfig, context: int, name: str = "the prompt") -> None:
        """Checks that a model can read the prompt and add `max_new_tokens` tokens within `context` tokens.

        Raises:
          UserError: it cannot; the message calls the prompt `name`.
        """
        length, only_scored = len(self.prompt), self.score_from is not None and self.max_new_tokens == 0
        if self.max_new_tokens < 1 and not only_scored:
            raise UserError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if length < 1:
            raise UserError(f"{name} is empty; give at least one token")
        if self.score_from is not None and not 1 <= self.score_from < length:
            raise UserError(f"score_from must be at least 1 and less than {length}, the number of tokens of {name}")
        if only_scored:
            context += 1  # the last token is predicted, but not read
        if length > context:
            raise UserError(f"{name} has {length} tokens but the model's context is {context}; shorten the prompt")
        if length + self.max_new_tokens > context:
            raise UserError(
                f"{name}'s {length} tokens and {self.max_new_tokens} new ones exceed the model's "
                f"context of {context}; ask for at most {context - length} new tokens"
            )
        for token in (*self.prompt, *(token for token, _ in self.sampler.logit_bias)):
            if not 0 <= token < config.vocab_size:
                raise UserError(
                    f"{name} holds token {token}, outside the model's vocabulary of {config.vocab_size}; "
                    "use the tokenizer the model was trained with"
                )


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Natural log-probabilities of a token, written or of a prompt, by the model's own distribution.

    That is the softmax of its logits. Temperature, top-k, top-p, min-p, penalties and logit bias have no part in it. A
    request with `Sampler()`, that is temperature 1 and nothing else, draws from this distribution, with drafts too:
    `logprob` is then the log-probability with which the token was drawn, as a policy gradient needs it.

    Attributes:
      logprob: of the token.
      top: the most likely tokens and theirs, most likely first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class Output:
    """What one step of the engine added to a request.

    Attributes:
      request_id: number that `submit` returned.
      tokens: the new tokens.
      drafted: for each of them, whether it was an accepted draft of the MTP module.
      experts: int32 [MoE layers, K] for each token that the model read for them: the experts it chose, best first. The
        first output has the prompt's tokens first. The token a new one was predicted from belongs to that one, so that
        there is one for each new token. Empty unless the engine has `record_experts`.
      logprobs: for each of them, if the request asked.
      text: the new text, if the engine has a `to_bytes`. Text that may be the start of a stop string, or of a character
        that is not complete, comes with a later output.
      finished: why the request has ended; None if it has not.
      prompt_logprobs: for each token of the prompt from `Request.score_from` on, with the most likely token at its
        position. They come in one output, when the prompt has been read.
    """

    request_id: int
    tokens: tuple[int, ...]
    drafted: tuple[bool, ...]
    experts: tuple[np.ndarray, ...] = dataclasses.field(compare=False)
    logprobs: tuple[TokenLogprobs, ...]
    text: str
    finished: FinishReason | None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


@dataclasses.dataclass
class Result:
    """A request's outputs together; fields as in `Output`.

    `experts` has one array for each token of the prompt and the text but the last, which the model never reads.
    """

    tokens: list[int] = dataclasses.field(default_factory=list)
    drafted: list[bool] = dataclasses.field(default_factory=list)
    experts: list[np.ndarray] = dataclasses.field(default_factory=list, compare=False)
    logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    text: str = ""
    finished: FinishReason | None = None
    prompt_logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)

    def add(self, output: Output) -> None:
        """Appends an output."""
        self.tokens += output.tokens
        self.drafted += output.drafted
        self.experts += output.experts
        self.logprobs += output.logprobs
        self.text += output.text
        self.finished = output.finished
        self.prompt_logprobs += output.prompt_logprobs
