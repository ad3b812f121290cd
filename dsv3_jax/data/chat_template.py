"""Chats as text and tokens: the template published with a model, and a plain one for this project's own models.

    template = ChatTemplate.of(tokenizer)  # None where the model has none
    ids = template.prompt([{"role": "user", "content": "Hello"}])  # for an engine, which goes on with the answer
    tokens = template.encode(messages)  # for fine-tuning: .ids, .from_assistant

A template is rendered as transformers renders it. A message's content is only text: names of control tokens in it do
not become these tokens, except the marks of thinking in the assistant's own turns.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dsv3_jax.data.control_tokens import ASSISTANT, END_THINK, THINK, USER
from dsv3_jax.data.template_process import TemplateProcess
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.errors import UserError

ROLES = ("system", "user", "assistant", "tool")
LARGEST_TEMPLATE = 2**20  # characters

# Unicode says that these two are no characters, so no text has them. The first is put into names of control tokens that
# are part of a message; the second stands for an answer where the rendering is searched for its place.
_BREAK, _ANSWER = "\ufdd0", "\ufdd1"

Message = Mapping[str, Any]
"""A message of a chat: `role` (one of ROLES) and `content`, both strings; a template may use further fields."""


@dataclasses.dataclass(frozen=True)
class ChatTokens:
    """A chat as tokens.

    Attributes:
      ids: the token ids.
      from_assistant: for each, whether the assistant wrote it; so is the token that ends its turn.
    """

    ids: list[int]
    from_assistant: list[bool]


class ChatTemplate:
    """A template that turns the messages of a chat into text and tokens.

    Attributes:
      text: the Jinja text.
    """

    def __init__(self, text: str, tokenizer: Tokenizer, name: str = "the chat template"):
        """Makes a template; it is first compiled when it is used.

        Args:
          text: the Jinja text, of at most 2^20 characters.
          tokenizer: the tokenizer of the model.
          name: what messages call it.

        Raises:
          UserError: the text is too long.
        """
        if len(text) > LARGEST_TEMPLATE:
            raise UserError(f"{name} has {len(text):,} characters; it may have at most {LARGEST_TEMPLATE:,}")
        self.text = text
        self._tokenizer = tokenizer
        self._process = TemplateProcess(text, name)
        names = sorted(tokenizer.control_names, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        tokens = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
        self._names = {name: tokenizer.to_bytes([token]).decode() for name, token in tokens.items()}

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ChatTemplate | None:
        """Returns the template that was published or saved with a tokenizer, or None if there is none."""
        text = tokenizer.settings.chat_template
        return None if text is None else cls(text, tokenizer)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Returns the ids of a chat up to where the model is to answer.

        Raises:
          UserError: there is no message, a role is unknown, a content is not text, or the template refuses the
            messages.
        """
        return self.ids(self.render(messages))

    def render(self, messages: Sequence[Message], *, continued: bool = False) -> str:
        """Returns a chat as text, up to where the model is to answer.

        Names of control tokens in a message hold a mark, with which `ids` takes them for text.

        Args:
          continued: the text ends with the content of the last message, for the model to go on with it.

        Raises:
          UserError: as of `prompt`.
        """
        chat = _checked(messages, self._control)
        (text,) = self._render([(chat, not continued)])
        if not continued:
            return text
        last = chat[-1]["content"].strip()
        end = text.rfind(last)
        if end < 0:
            raise UserError(
                "the chat template does not write the last message as it is, so that none can go on with it"
            )
        return text[: end + len(last)]

    def ids(self, text: str) -> list[int]:
        """Returns the ids of what `render` returned, with any text after it."""
        return self._tokens(text, []).ids

    def encode(self, messages: Sequence[Message]) -> ChatTokens:
        """Returns the tokens of a whole chat, and which of them the assistant wrote.

        Raises:
          UserError: as of `prompt`, or the template writes an earlier turn differently when later ones follow.
        """
        chat = _checked(messages, self._control)
        turns = [number for number, message in enumerate(chat) if message["role"] == "assistant"]
        jobs = [(chat, False)]
        for number in turns:
            stand_in = {**chat[number], "content": _ANSWER}
            jobs += [(chat[:number], True), ([*chat[:number], stand_in], False), (chat[: number + 1], False)]
        whole, *others = self._render(jobs)
        spans = []
        for turn, prompt, stand_in, up_to_turn in zip(turns, others[::3], others[1::3], others[2::3], strict=True):
            # The turn begins where the answer does, or before it, where the model would go on from its prompt.
            start = _common_length(prompt, stand_in)
            if not (whole.startswith(up_to_turn) and whole[:start] == stand_in[:start]):
                raise UserError(
                    f"the chat template writes message {turn} differently when others follow it, so that it cannot be "
                    "told which tokens are the assistant's; give chats that end with one answer of the assistant"
                )
            spans.append((start, len(up_to_turn)))
        return self._tokens(whole, spans)

    def _render(self, jobs: Sequence[tuple[Sequence[Message], bool]]) -> list[str]:
        """Returns the text of each chat, with the beginning of an answer or without."""
        fixed = {**self._names, "tools": None, "documents": None}
        return self._process.render([{**fixed, "messages": c, "add_generation_prompt": prompt} for c, prompt in jobs])

    def _tokens(self, text: str, spans: Sequence[tuple[int, int]]) -> ChatTokens:
        """Returns the tokens of a rendered text; no token crosses a break."""
        ids: list[int] = []
        starts: list[int] = []
        at = 0
        for piece in text.split(_BREAK):
            new, offsets = self._tokenizer.encode_with_starts(piece)
            ids += new
            starts += [at + offset for offset in offsets]
            at += len(piece) + len(_BREAK)
        return ChatTokens(ids, [any(first <= start < last for first, last in spans) for start in starts])


def plain_template(tokenizer: Tokenizer) -> str:
    """Returns the Jinja text of this project's own template, which any tokenizer can write.

    It is laid out as DeepSeek-V3's: the system's text, then turns of user and assistant that begin with a control
    token; the assistant's end with the end-of-text token. A tokenizer without these tokens gets words in their place.
    """
    end = tokenizer.to_bytes([tokenizer.eos_id]).decode()
    # In training an end-of-text token precedes every document.
    start = tokenizer.to_bytes([tokenizer.bos_id]).decode() if tokenizer.adds_bos else end
    user = USER if tokenizer.control_id(USER) is not None else "\n\nUser:\n"
    assistant = ASSISTANT if tokenizer.control_id(ASSISTANT) is not None else "\n\nAssistant:\n"
    words = {"start": start, "end": end, "user": user, "assistant": assistant}
    assignments = "".join(
        f"{{% set {name} = {json.dumps(word, ensure_ascii=False)} %}}" for name, word in words.items()
    )
    return assignments + _PLAIN


_PLAIN = """\
{{ start }}
{%- for message in messages %}
    {%- if message.role == "system" %}
        {{- message.content }}
    {%- elif message.role == "user" %}
        {{- user + message.content }}
    {%- elif message.role == "assistant" %}
        {{- assistant + message.content + end }}
    {%- else %}
        {{- raise_exception("this template has no turns of the role " + message.role) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- assistant }}
{%- endif %}
"""


def _checked(messages: Sequence[Message], control: re.Pattern[str]) -> list[dict[str, Any]]:
    """Returns messages whose contents hold no control tokens, after checking their fields."""
    if not len(messages):
        raise UserError("the chat has no messages; give at least one, such as {'role': 'user', 'content': '...'}")
    checked = []
    for number, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise UserError(f"message {number} has the role {role!r:.60}; it must be one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise UserError(f"the content of message {number} must be text, not {content!r:.60}")
        kept = (THINK, END_THINK) if role == "assistant" else ()

        def broken(found: re.Match[str], kept: tuple[str, ...] = kept) -> str:
            return found[0] if found[0] in kept else found[0][0] + _BREAK + found[0][1:]

        content = content.replace(_BREAK, "\ufffd").replace(_ANSWER, "\ufffd")
        checked.append({**message, "content": control.sub(broken, content)})
    return checked


def _common_length(left: str, right: str) -> int:
    """Returns the length of the longest beginning that two texts share."""
    shorter = min(len(left), len(right))
    return next((at for at in range(shorter) if left[at] != right[at]), shorter)
