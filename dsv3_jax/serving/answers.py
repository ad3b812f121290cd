"""Answers in the form of OpenAI's API, whole or in pieces, from what the engine writes."""

from __future__ import annotations

import codecs
import secrets
import time
from typing import Any

from dsv3_jax.inference import Output, Result
from dsv3_jax.serving.bodies import Asked
from dsv3_jax.serving.settings import ServedModel


class Answer:
    """The answer to one HTTP request."""

    def __init__(self, asked: Asked, model: ServedModel):
        self._asked, self._model = asked, model
        self._tokens = 0
        self._lengths = [0] * len(asked.requests)  # characters of each text so far
        self._decoders = [codecs.getincrementaldecoder("utf-8")(errors="replace") for _ in asked.requests]
        self._fixed = {
            "id": f"{'chatcmpl' if asked.is_chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model.name,
            "system_fingerprint": model.note,
        }

    def first(self) -> list[dict[str, Any]]:
        """Returns the chunks with which a stream begins: in a chat they name the role."""
        if not self._asked.is_chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(self._choice(number, {"delta": delta})) for number in range(len(self._asked.requests))]

    def piece(self, number: int, output: Output) -> dict[str, Any]:
        """Returns the chunk of a stream for what the engine added to completion `number`."""
        self._tokens += len(output.tokens)
        choice = self._choice(
            number, {"delta": {"content": output.text}} if self._asked.is_chat else {"text": output.text}
        )
        choice |= {"finish_reason": output.finished, "logprobs": self._logprobs(number, output)}
        if self._asked.token_details:
            choice["token_details"] = self._details(number, output)
        self._lengths[number] += len(output.text)
        return self._chunk(choice)

    def last(self) -> list[dict[str, Any]]:
        """Returns the chunks with which a stream ends."""
        return [{**self._chunk(), "usage": self._usage()}] if self._asked.include_usage else []

    def whole(self, results: list[Result]) -> dict[str, Any]:
        """Returns the answer in one piece."""
        choices = []
        for number, result in enumerate(results):
            output = Output(
                request_id=number,
                tokens=tuple(result.tokens),
                drafted=tuple(result.drafted),
                experts=tuple(result.experts),
                logprobs=tuple(result.logprobs),
                text=result.text,
                finished=result.finished,
            )
            message = {"role": "assistant", "content": result.text, "refusal": None}
            choice = self._choice(number, {"message": message} if self._asked.is_chat else {"text": result.text})
            choice |= {"finish_reason": result.finished, "logprobs": self._logprobs(number, output)}
            if self._asked.token_details:
                choice["token_details"] = self._details(number, output)
            choices.append(choice)
            self._tokens += len(result.tokens)
        kind = "chat.completion" if self._asked.is_chat else "text_completion"
        return {**self._fixed, "object": kind, "choices": choices, "usage": self._usage()}

    def _chunk(self, *choices: dict[str, Any]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._asked.is_chat else "text_completion"
        return {**self._fixed, "object": kind, "choices": list(choices)}

    def _choice(self, number: int, content: dict[str, Any]) -> dict[str, Any]:
        return {"index": number, **content, "finish_reason": None, "logprobs": None}

    def _usage(self) -> dict[str, int]:
        prompt = self._asked.prompt_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._tokens,
            "total_tokens": prompt + self._tokens,
        }

    def _shown(self, number: int, output: Output) -> tuple[int, ...]:
        """Returns the tokens without one that ended the text."""
        ends = output.finished == "stop" and output.tokens[-1:] and output.tokens[-1] in self._stop_tokens(number)
        return output.tokens[:-1] if ends else output.tokens

    def _stop_tokens(self, number: int) -> tuple[int, ...]:
        return self._asked.requests[number].stop_tokens

    def _logprobs(self, number: int, output: Output) -> dict[str, Any] | None:
        if self._asked.requests[number].top_logprobs is None:
            return None
        tokens = self._shown(number, output)
        scored = list(zip(tokens, output.logprobs, strict=False))
        if self._asked.is_chat:
            content = [
                {
                    **self._scored(token, of.logprob),
                    "top_logprobs": [self._scored(other, logprob) for other, logprob in of.top],
                }
                for token, of in scored
            ]
            return {"content": content, "refusal": None}
        offsets, offset = [], self._lengths[number]
        for token in tokens:
            offsets.append(offset)
            offset += len(self._word(token))
        return {
            "tokens": [self._word(token) for token in tokens],
            "token_logprobs": [of.logprob for _, of in scored],
            # Of tokens with the same text, such as parts of characters, the most likely counts.
            "top_logprobs": [{self._word(other): logprob for other, logprob in reversed(of.top)} for _, of in scored],
            "text_offset": offsets,
        }

    def _scored(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self._word(token), "logprob": logprob, "bytes": list(self._model.tokenizer.to_bytes([token]))}

    def _word(self, token: int) -> str:
        return self._model.tokenizer.decode([token])

    def _details(self, number: int, output: Output) -> list[dict[str, Any]]:
        """Returns for each token its text, whether it was an accepted draft, and experts [layers][K].

        The experts are those that the token before chose: the one that the model read to write this token.
        """
        tokens = self._shown(number, output)
        experts = output.experts[-len(output.tokens) :] if output.experts else ()
        to_bytes, decoder = self._model.tokenizer.to_bytes, self._decoders[number]
        details = [
            {
                "text": decoder.decode(to_bytes([token])),
                "drafted": drafted,
                "experts_before": experts[at].tolist() if at < len(experts) else [],
            }
            for at, (token, drafted) in enumerate(zip(tokens, output.drafted, strict=False))
        ]
        if output.finished and details:
            details[-1]["text"] += decoder.decode(b"", final=True)
        return details
