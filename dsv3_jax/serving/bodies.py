"""Bodies of HTTP requests, checked, as requests to the engine."""

from __future__ import annotations

import dataclasses
import hashlib
import secrets
from typing import Any

from dsv3_jax.bounded_json import parse_object
from dsv3_jax.errors import UserError
from dsv3_jax.inference import Request, Sampler
from dsv3_jax.serving.errors import ApiError
from dsv3_jax.serving.settings import ServedModel

MOST_CHOICES = 128  # completions of one HTTP request
MOST_STOPS = 16
_DEFAULT_TOKENS = 16  # of a completion, as in OpenAI's API; an answer of a chat may fill the context
_IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
# Fields with one value that asks for nothing.
_NEUTRAL = {
    "echo": False,
    "suffix": None,
    "response_format": {"type": "text"},
    "tools": [],
    "tool_choice": "none",
    "modalities": ["text"],
    "parallel_tool_calls": True,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """What a client asks for.

    Attributes:
      requests: one per completion, those of the first prompt first.
      prompt_tokens: number of tokens of all prompts.
      is_chat: whether it is a chat.
      stream: whether the answer comes in pieces.
      include_usage: whether a stream ends with the numbers of tokens.
      token_details: whether each token is told apart, with its draft and its experts.
    """

    requests: tuple[Request, ...]
    prompt_tokens: int
    is_chat: bool
    stream: bool
    include_usage: bool
    token_details: bool


def read_completion(data: bytes, model: ServedModel, context: int) -> Asked:
    """Returns what the body of /v1/completions asks for.

    Args:
      context: most tokens of a prompt and its continuation.

    Raises:
      ApiError: it is not JSON, has unknown fields, or a value that cannot be used.
    """
    fields = _Fields.parse(data, model)
    prompts = _prompts(fields.value("prompt", None), model)
    top = fields.whole("logprobs", None, 0, 20)
    best_of, n = fields.whole("best_of", None, 1, MOST_CHOICES), fields.whole("n", 1, 1, MOST_CHOICES)
    if best_of not in (None, n):
        raise ApiError("'best_of' must equal 'n'", param="best_of")
    most = fields.whole("max_tokens", None, 1, 2**31)
    return _asked(fields, prompts, n, model, context, is_chat=False, top=top, most=most)


def read_chat(data: bytes, model: ServedModel, context: int) -> Asked:
    """Returns what the body of /v1/chat/completions asks for; arguments and errors as of `read_completion`."""
    fields = _Fields.parse(data, model)
    messages = [_message(each) for each in fields.items("messages")]
    if model.template is None:
        raise ApiError(
            f"the model '{model.name}' has no chat template, because it was trained on texts, not on chats; "
            "use /v1/completions",
            code="no_chat_template",
        )
    try:
        prompt = model.template.prompt(messages)
    except UserError as error:
        raise ApiError(str(error), param="messages") from error
    top = fields.whole("top_logprobs", None, 0, 20)
    wanted = fields.truth("logprobs", False)
    if top is not None and not wanted:
        raise ApiError("'top_logprobs' needs 'logprobs': true", param="top_logprobs")
    most = fields.whole("max_tokens", None, 1, 2**31)
    most = fields.whole("max_completion_tokens", most, 1, 2**31)
    n = fields.whole("n", 1, 1, MOST_CHOICES)
    return _asked(fields, [prompt], n, model, context, is_chat=True, top=(top or 0) if wanted else None, most=most)


def _asked(
    fields: _Fields,
    prompts: list[list[int]],
    n: int,
    model: ServedModel,
    context: int,
    *,
    is_chat: bool,
    top: int | None,
    most: int | None,
) -> Asked:
    """Reads the fields that chats and completions share, and returns all requests."""
    sampler = _sampler(fields, model.sampler)
    stops = fields.items("stop") if isinstance(fields.value("stop", []), list) else [fields.value("stop", None)]
    if len(stops) > MOST_STOPS or not all(isinstance(stop, str) and 0 < len(stop) <= 1000 for stop in stops):
        raise ApiError(f"'stop' must be a text or at most {MOST_STOPS} texts of 1 to 1000 characters", param="stop")
    seed = fields.whole("seed", None, -(2**63), 2**64 - 1)
    seed = secrets.randbits(64) if seed is None else seed % 2**64
    stream = fields.truth("stream", False)
    options = fields.value("stream_options", None) or {}
    if not isinstance(options, dict) or (options and not stream):
        raise ApiError("'stream_options' must be an object, and needs 'stream': true", param="stream_options")
    details = fields.truth("token_details", False)
    fields.refuse_others()
    if len(prompts) * n > MOST_CHOICES:
        raise ApiError(f"{len(prompts)} prompts with 'n': {n} ask for more than {MOST_CHOICES} completions", param="n")
    requests = []
    for prompt in prompts:
        left = context - len(prompt)
        if left < 1:
            raise ApiError(
                f"the prompt has {len(prompt)} tokens, but the model's context is {context}, of which one is for the "
                "answer; shorten it",
                param="messages" if is_chat else "prompt",
                code="context_length_exceeded",
            )
        new = most or (left if is_chat else min(_DEFAULT_TOKENS, left))
        if new > left:
            raise ApiError(
                f"the prompt has {len(prompt)} tokens and {new} new ones are asked for, but the model's context is "
                f"{context}; ask for at most {left}",
                param="max_tokens",
                code="context_length_exceeded",
            )
        for choice in range(n):
            request = Request(
                prompt=tuple(prompt),
                max_new_tokens=new,
                sampler=sampler,
                seed=_choice_seed(seed, choice),
                stop_tokens=model.tokenizer.end_ids,
                stop_strings=tuple(stops),
                top_logprobs=top,
            )
            requests.append(request)
    return Asked(
        requests=tuple(requests),
        prompt_tokens=sum(map(len, prompts)),
        is_chat=is_chat,
        stream=stream,
        include_usage=bool(options.get("include_usage")),
        token_details=details,
    )


class _Fields:
    """The fields of a body, each read once."""

    def __init__(self, values: dict[str, Any]):
        self._values = values
        self._known = {"model", *_IGNORED}

    @classmethod
    def parse(cls, data: bytes, model: ServedModel) -> _Fields:
        try:
            fields = cls(parse_object(data, "the body"))
        except UserError as error:
            raise ApiError(str(error)) from error
        name = fields.value("model", model.name)
        if name != model.name:
            raise ApiError(
                f"the model {name!r:.100} does not exist; this server has '{model.name}'",
                status=404,
                param="model",
                code="model_not_found",
            )
        for name, neutral in _NEUTRAL.items():
            if fields.value(name, neutral) != neutral:
                raise ApiError(f"'{name}' is not supported; leave it out", param=name, code="unsupported_parameter")
        return fields

    def value(self, name: str, default: Any) -> Any:
        self._known.add(name)
        value = self._values.get(name)
        return default if value is None else value

    def items(self, name: str) -> list[Any]:
        value = self.value(name, [])
        if not isinstance(value, list):
            raise ApiError(f"'{name}' must be a list, not {value!r:.60}", param=name)
        return value

    def truth(self, name: str, default: bool) -> bool:
        value = self.value(name, default)
        if not isinstance(value, bool):
            raise ApiError(f"'{name}' must be true or false, not {value!r:.60}", param=name)
        return value

    def whole[Default](self, name: str, default: Default, least: int, most: int) -> int | Default:
        value = self.value(name, None)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ApiError(f"'{name}' must be a whole number from {least} to {most}, not {value!r:.60}", param=name)
        return value

    def number[Default](self, name: str, default: Default, least: float, most: float) -> float | Default:
        value = self.value(name, None)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise ApiError(f"'{name}' must be a number from {least:g} to {most:g}, not {value!r:.60}", param=name)
        return float(value)

    def refuse_others(self) -> None:
        """Raises ApiError if the body has a field that was not read."""
        for name in self._values:
            if name not in self._known:
                raise ApiError(
                    f"there is no parameter {name!r:.60}; leave it out", param=name[:60], code="unknown_parameter"
                )


def _sampler(fields: _Fields, default: Sampler) -> Sampler:
    bias = fields.value("logit_bias", {})
    if not isinstance(bias, dict) or not all(
        token.isascii() and token.isdigit() and type(value) in (int, float) and -100 <= value <= 100
        for token, value in bias.items()
    ):
        raise ApiError("'logit_bias' must map token ids to numbers from -100 to 100", param="logit_bias")
    top_p = fields.number("top_p", default.top_p, 0, 1)
    try:
        return Sampler(
            temperature=fields.number("temperature", default.temperature, 0, 100),
            top_k=fields.whole("top_k", default.top_k, 1, 2**31),
            top_p=top_p,
            min_p=fields.number("min_p", default.min_p, 0, 1),
            repetition_penalty=fields.number("repetition_penalty", default.repetition_penalty, 0.01, 100),
            presence_penalty=fields.number("presence_penalty", default.presence_penalty, -2, 2),
            frequency_penalty=fields.number("frequency_penalty", default.frequency_penalty, -2, 2),
            logit_bias=tuple((int(token), float(value)) for token, value in bias.items()),
        )
    except UserError as error:  # such as a top_p of 0
        raise ApiError(str(error)) from error


def _prompts(value: Any, model: ServedModel) -> list[list[int]]:
    """Returns the token ids of a text, of token ids, or of a list of either."""
    if value is None:
        value = ""
    whole = [value] if isinstance(value, str) or _are_ids(value) else value
    if not isinstance(whole, list) or not whole or not all(isinstance(each, str) or _are_ids(each) for each in whole):
        raise ApiError("'prompt' must be a text, token ids, or a list that is not empty of either", param="prompt")
    try:
        # Names of control tokens are text here: a prompt may come from anywhere. Token ids may be any.
        return [
            model.tokenizer.prompt_ids(each, control_tokens=False) if isinstance(each, str) else each for each in whole
        ]
    except UserError as error:
        raise ApiError(str(error), param="prompt") from error


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(type(each) is int and 0 <= each < 2**31 for each in value)


def _message(value: Any) -> dict[str, Any]:
    """Returns a message whose content is a text, where the API also takes a list of parts."""
    if not isinstance(value, dict):
        raise ApiError(f"each of 'messages' must be an object, not {value!r:.60}", param="messages")
    content, role = value.get("content"), value.get("role")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise ApiError("the parts of a message's content must be texts", param="messages")
        content = "".join(part["text"] for part in content)
    return {**value, "role": "system" if role == "developer" else role, "content": content}


def _choice_seed(seed: int, choice: int) -> int:
    """Returns the seed of one of several completions of a prompt."""
    if choice == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed} {choice}".encode(), digest_size=8).digest(), "big")
