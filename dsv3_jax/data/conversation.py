"""A sample of fine-tuning data: its turns, read from a row of a file.

A row is one of these objects:

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"prompt": "...", "completion": "..."}                 what `dsv3 sample` writes; no chat template is used
    {"prompt": [messages], "completion": [messages]}
    {"prompt": ..., "chosen": ..., "rejected": ...}        a preference pair, whose chosen answer is learned
    {"chosen": [messages], "rejected": [messages]}         the same with whole conversations
    {"text": "..."}                                        a text, all of which is learned
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

from dsv3_jax.data.document_files import FileRow
from dsv3_jax.errors import UserError

Role = Literal["system", "user", "assistant"]

NEEDED_FIELDS = ("messages", "prompt", "text", "chosen", "rejected")
"""Fields of which a file of samples has at least one."""
OTHER_FIELDS = ("completion", "cut")


@dataclasses.dataclass(frozen=True)
class Message:
    """A turn of a conversation.

    Attributes:
      role: who speaks; not always one of `Role`.
      content: what is said.
    """

    role: str
    content: str


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A conversation in a model's chat format.

    Attributes:
      messages: its turns.
      given: how many turns at the start are only read, whoever speaks.
    """

    messages: tuple[Message, ...]
    given: int = 0

    @property
    def problem(self) -> str:
        """Why it cannot be used: "unknown role", "empty turn", or the empty string where it can."""
        if any(message.role not in get_args(Role) for message in self.messages):
            return "unknown role"
        empty = not self.messages or any(not message.content.strip() for message in self.messages)
        return "empty turn" if empty else ""


@dataclasses.dataclass(frozen=True)
class Continuation:
    """A text and what continues it, without a chat format.

    Attributes:
      prompt: the text that is given; None where the whole of `completion` is a document of its own.
      completion: the text that is learned.
      ends: whether an end-of-text token follows.
    """

    prompt: str | None
    completion: str
    ends: bool = True

    @property
    def problem(self) -> str:
        """Why it cannot be used: "empty turn", or the empty string where it can."""
        return "" if self.completion else "empty turn"


Sample = Conversation | Continuation


def read_sample(row: FileRow) -> Sample | None:
    """Returns the sample in a row; None where `dsv3 sample` noted that it kept no completion of a problem.

    Raises:
      UserError: the row is no sample; the message gives the line.
    """
    values, where = _without_nulls(row), row.where
    if "messages" in values:
        return Conversation(_messages(values["messages"], f"{where}: messages"))
    if "chosen" in values:
        return _answer(values, "chosen", where)
    if "rejected" in values and "prompt" not in values:
        return None
    if "prompt" in values:
        if "completion" not in values:
            raise UserError(f"{where}: a prompt without a field 'completion'")
        return _continued(values["prompt"], values["completion"], where, "completion", ends=not values.get("cut"))
    if "text" in values:
        return Continuation(None, _string(values["text"], f"{where}: text"))
    fields = ", ".join(map(repr, list(row.values)[:8]))
    raise UserError(f"{where}: expected a field 'messages', 'prompt' or 'text'; the fields are {fields or 'none'}")


def read_pair(row: FileRow) -> tuple[Sample, Sample]:
    """Returns the chosen and the rejected sample of a preference pair.

    Raises:
      UserError: the row is no pair; the message gives the line.
    """
    values, where = _without_nulls(row), row.where
    for name in ("chosen", "rejected"):
        if name not in values:
            raise UserError(f"{where}: a preference pair needs a field {name!r}")
    return _answer(values, "chosen", where), _answer(values, "rejected", where)


def _answer(values: dict[str, Any], name: str, where: str) -> Sample:
    """Returns one of the answers of a pair, after the prompt if there is one."""
    if "prompt" in values:
        return _continued(values["prompt"], values[name], where, name)
    return Conversation(_messages(values[name], f"{where}: {name}"))


def _continued(prompt: Any, completion: Any, where: str, name: str, *, ends: bool = True) -> Sample:
    """Returns a prompt and what follows it, which are either two texts or two lists of messages."""
    if isinstance(prompt, list):
        given = _messages(prompt, f"{where}: prompt")
        return Conversation((*given, *_messages(completion, f"{where}: {name}")), given=len(given))
    return Continuation(_string(prompt, f"{where}: prompt"), _string(completion, f"{where}: {name}"), ends=ends)


def _messages(value: Any, where: str) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise UserError(f"{where} must be a list of objects with role and content, not {type(value).__name__}")
    found = []
    for number, each in enumerate(value, start=1):
        if not isinstance(each, dict) or not isinstance(each.get("role"), str):
            raise UserError(f"{where}: message {number} must be an object with a role and a content")
        found.append(Message(each["role"], _string(each.get("content"), f"{where}: content of message {number}")))
    return tuple(found)


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where} must be a string, not {'null' if value is None else type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: character {error.start} is a lone surrogate, which has no UTF-8 form") from None
    return value


def _without_nulls(row: FileRow) -> dict[str, Any]:
    """Returns the fields that are not null: a Parquet file has a column in every row."""
    return {name: value for name, value in row.values.items() if value is not None}
