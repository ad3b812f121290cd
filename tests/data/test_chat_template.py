"""Checks what a chat becomes as text and tokens, which tokens are the assistant's, and the limits of templates."""

from __future__ import annotations

import json
import threading
from typing import Any

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_jax.data import ChatTemplate, Tokenizer, plain_template
from dsv3_jax.data.control_tokens import ASSISTANT, BEGIN_OF_TEXT, END_OF_TEXT, END_THINK, THINK, USER
from dsv3_jax.data.template_process import TemplateProcess
from dsv3_jax.data.tokenizer_training import byte_tokenizer
from dsv3_jax.errors import UserError

# It has what published templates have: namespaces, loops, a default, thinking that is cut off, refusals.
PUBLISHED = """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{%- set ns = namespace(system='') -%}
{%- for m in messages if m['role'] == 'system' -%}
  {%- set ns.system = ns.system + m['content'] -%}
{%- endfor -%}
{{ bos_token }}{{ ns.system }}
{%- for m in messages -%}
  {%- if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif -%}
  {%- if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}{% endif -%}
  {%- if m['role'] == 'assistant' -%}
    {% set content = m['content'].split('</think>')[-1] %}
    {{- '<｜Assistant｜>' }}{% generation %}{{ content + eos_token }}{% endgeneration -%}
  {%- endif -%}
{%- endfor -%}
{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"""


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Returns a tokenizer with one id per byte."""
    return Tokenizer(byte_tokenizer())


@pytest.fixture(scope="module")
def plain(tokenizer: Tokenizer) -> ChatTemplate:
    """Returns the project's own template."""
    return ChatTemplate(plain_template(tokenizer), tokenizer)


@pytest.fixture(scope="module")
def published(tokenizer: Tokenizer) -> ChatTemplate:
    """Returns a template as models are published with."""
    return ChatTemplate(PUBLISHED, tokenizer)


def chat(*turns: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, _, content in (turn.partition(": ") for turn in turns)]


CHAT = chat("system: Be brief.", "user: Né?", "assistant: Oui.", "user: 2+2", "assistant: 4")


def test_plain_template(plain: ChatTemplate, tokenizer: Tokenizer) -> None:
    tokens = plain.encode(CHAT)
    text = f"{END_OF_TEXT}Be brief.{USER}Né?{ASSISTANT}Oui.{END_OF_TEXT}{USER}2+2{ASSISTANT}4{END_OF_TEXT}"
    assert tokens.ids == tokenizer.encode(text, control_tokens=True)
    assistant = [i for i, own in zip(tokens.ids, tokens.from_assistant, strict=True) if own]
    assert assistant == tokenizer.encode(f"Oui.{END_OF_TEXT}4{END_OF_TEXT}", control_tokens=True)


def test_the_prompt_is_the_chat_up_to_the_answer(plain: ChatTemplate, tokenizer: Tokenizer) -> None:
    whole = plain.encode(CHAT)
    prompt = plain.prompt(CHAT[:-1])
    assert whole.ids[: len(prompt)] == prompt
    assert whole.from_assistant[len(prompt) :] == [True] * (len(whole.ids) - len(prompt))
    assert tokenizer.decode(prompt).endswith(f"2+2{ASSISTANT}")


def test_published_template(published: ChatTemplate, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.decode(published.prompt(CHAT))
    start = f"{BEGIN_OF_TEXT}Be brief.{USER}Né?{ASSISTANT}Oui.{END_OF_TEXT}{USER}2+2{ASSISTANT}4{END_OF_TEXT}"
    assert prompt == f"{start}{ASSISTANT}{THINK}\n"
    thinking = chat("user: 2+2", f"assistant: {THINK}hm{END_THINK}<4>")
    tokens = published.encode(thinking)
    assert tokenizer.decode(tokens.ids) == f"{BEGIN_OF_TEXT}{USER}2+2{ASSISTANT}<4>{END_OF_TEXT}"
    own = [i for i, own in zip(tokens.ids, tokens.from_assistant, strict=True) if own]
    assert tokenizer.decode(own) == f"<4>{END_OF_TEXT}"


def test_text_is_that_of_jinja(published: ChatTemplate, tokenizer: Tokenizer) -> None:
    """The oracle is Jinja without a sandbox or a process, with the tag that only marks taken out."""
    text = PUBLISHED.replace("{% generation %}", "").replace("{% endgeneration -%}", "{#- -#}")
    jinja = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(text)
    names = {"bos_token": BEGIN_OF_TEXT, "eos_token": END_OF_TEXT}
    assert tokenizer.decode(published.encode(CHAT).ids) == jinja.render(messages=CHAT, **names)


PIECES = [*"a<>｜/ \n\ufdd0\ufdd1é", "User", "think", USER, END_OF_TEXT, THINK]


@given(content=st.lists(st.sampled_from(PIECES), max_size=9).map("".join))
def test_control_tokens_of_a_content_are_text(plain: ChatTemplate, tokenizer: Tokenizer, content: str) -> None:
    tokens = plain.encode([{"role": "user", "content": content}, {"role": "assistant", "content": content}])
    control = [tokenizer.to_bytes([i]).decode() for i in tokens.ids if not tokenizer.token_bytes[i]]
    thinking = [name for name in control if name in (THINK, END_THINK)]
    assert [name for name in control if name not in thinking] == [END_OF_TEXT, USER, ASSISTANT, END_OF_TEXT]
    assert len(thinking) == content.count(THINK)
    kept = content.replace("\ufdd0", "\ufffd").replace("\ufdd1", "\ufffd")
    assert tokenizer.decode(tokens.ids) == f"{END_OF_TEXT}{USER}{kept}{ASSISTANT}{kept}{END_OF_TEXT}"


def test_words_take_the_place_of_missing_control_tokens() -> None:
    definition = json.loads(byte_tokenizer())
    definition["added_tokens"] = definition["added_tokens"][:3]
    tokenizer = Tokenizer(json.dumps(definition))
    tokens = ChatTemplate(plain_template(tokenizer), tokenizer).encode(chat("user: a", "assistant: b"))
    assert tokenizer.decode(tokens.ids) == f"{END_OF_TEXT}\n\nUser:\na\n\nAssistant:\nb{END_OF_TEXT}"
    assert sum(tokens.from_assistant) == 2


def test_a_saved_template_is_found_again(tokenizer: Tokenizer, tmp_path) -> None:
    assert ChatTemplate.of(tokenizer) is None
    tokenizer.with_chat_template(plain_template(tokenizer)).save(tmp_path)
    found = ChatTemplate.of(Tokenizer.load(tmp_path, verified=True))
    assert found is not None
    assert found.text == plain_template(tokenizer)


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({"tokenizer_config.json": {"chat_template": "one"}}, "one"),
        ({"tokenizer_config.json": {"chat_template": [{"name": "tool_use", "template": "t"}]}}, None),
        (
            {"tokenizer_config.json": {"chat_template": [{"name": "x"}, {"name": "default", "template": "two"}]}},
            "two",
        ),
        ({"chat_template.json": {"chat_template": "three"}}, "three"),
        ({"tokenizer_config.json": {}}, None),
    ],
)
def test_where_templates_are_found(files: dict[str, Any], text: str | None) -> None:
    tokenizer = Tokenizer(byte_tokenizer(), companions={name: json.dumps(value) for name, value in files.items()})
    assert tokenizer.settings.chat_template == text


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "no messages"),
        (chat("robot: hi"), "message 0 has the role 'robot'; it must be one of system, user"),
        ([{"content": "hi"}], "the role None"),
        ([*CHAT, {"role": "user", "content": 7}], "content of message 5 must be text, not 7"),
        ([{"role": "user", "content": None}], "must be text"),
        (chat("tool: 4"), "the chat template: this template has no turns of the role tool"),
    ],
)
def test_bad_messages_are_one_line(plain: ChatTemplate, messages, message: str) -> None:
    for use in (plain.encode, plain.prompt):
        with pytest.raises(UserError, match=message) as raised:
            use(messages)
        assert "\n" not in str(raised.value)


def test_a_template_may_refuse(published: ChatTemplate) -> None:
    with pytest.raises(UserError, match="no tools here"):
        published.prompt(chat("user: a", "tool: b"))
    assert published.prompt(chat("user: a"))  # the process goes on


def test_a_template_that_changes_earlier_turns(tokenizer: Tokenizer) -> None:
    text = "{% for m in messages %}{{ m.content if loop.last else '-' }}{% endfor %}"
    template = ChatTemplate(text, tokenizer)
    with pytest.raises(UserError, match="writes message 0 differently"):
        template.encode(chat("assistant: a", "user: b"))
    assert template.prompt(chat("assistant: a", "user: b")) == tokenizer.encode("-b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{% for %}", "the chat template: "),
        ("{{ messages[0].__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "safe"),
        ("{{ absent.field }}", "absent"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% include 'x' %}", "loader"),
    ],
)
def test_bad_templates_are_one_line(tokenizer: Tokenizer, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        ChatTemplate(text, tokenizer).prompt(chat("user: a"))
    assert "\n" not in str(raised.value)


def test_a_template_too_long(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="at most 1,048,576"):
        ChatTemplate("a" * (2**20 + 1), tokenizer)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "text",
    [
        "{% if bad %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}fine",
        "{% if bad %}{{ 'a' * 2000000000 }}{% endif %}fine",
    ],
    ids=["time", "memory"],
)
def test_limits(text: str) -> None:
    process = TemplateProcess(text, "this template", seconds=2)
    with pytest.raises(UserError, match="this template: it takes more than 1 GiB of memory or 2 s"):
        process.render([{"bad": True}])
    # Calls from several threads are answered by a new process.
    answers: list[list[str]] = []
    threads = [threading.Thread(target=lambda: answers.append(process.render([{"bad": False}]))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [["fine"]] * 3


def test_a_process_that_was_killed_is_started_again() -> None:
    process = TemplateProcess("{{ a }}", "this template")
    assert process.render([{"a": 1}]) == ["1"]
    running = process._process
    assert running is not None
    running.kill()
    with pytest.raises(UserError, match="more than"):
        process.render([{"a": 2}])
    assert process.render([{"a": 3}, {"a": "x" * 200_000}]) == ["3", "x" * 200_000]
