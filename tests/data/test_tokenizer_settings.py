"""Checks what a tokenizer takes from the files beside it: begin and end tokens, and the authors' sampling."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.data import Tokenizer
from dsv3_jax.data import control_tokens as control
from dsv3_jax.data.tokenizer_settings import read_settings
from dsv3_jax.data.tokenizer_training import byte_tokenizer
from dsv3_jax.errors import UserError

BOS = control.BEGIN_OF_TEXT
POST = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [],
    "special_tokens": {},
}


@pytest.mark.parametrize(
    ("config", "post_processor", "adds"),
    [
        ({}, None, False),
        ({"add_bos_token": True}, None, True),
        ({"add_bos_token": True, "bos_token": {"content": BOS}}, None, True),
        ({"add_bos_token": False}, POST, False),
        ({}, POST, True),
        ({}, {"type": "Sequence", "processors": [{"type": "ByteLevel"}, POST]}, True),
        ({"bos_token": "<think>", "add_bos_token": True}, None, True),
    ],
)
def test_begin_token_of_prompts(config: dict[str, Any], post_processor: Any, adds: bool) -> None:
    companions = {"tokenizer_config.json": json.dumps(config)}
    tokenizer = Tokenizer(
        json.dumps({**json.loads(byte_tokenizer()), "post_processor": post_processor}), companions=companions
    )
    name = "<think>" if config.get("bos_token") == "<think>" else BOS
    assert tokenizer.bos_id == tokenizer.control_id(name)
    text = tokenizer.encode("pears")
    assert tokenizer.prompt_ids("pears") == [tokenizer.bos_id] * adds + text
    assert tokenizer.prompt_ids(name + "pears") == [tokenizer.bos_id, *text]
    assert tokenizer.prompt_ids("") == [tokenizer.bos_id if adds else tokenizer.eos_id]
    user = tokenizer.control_id(control.USER)
    assert tokenizer.prompt_ids(control.USER)[-1] == user
    assert user not in tokenizer.prompt_ids(control.USER, control_tokens=False)


def test_ends_and_sampling_of_the_authors(tmp_path: Path) -> None:
    byte_level = Tokenizer(byte_tokenizer())
    byte_level.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 5, "bos_token_id": 7, "other": 1}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<think>", "pad_token": "</think>"}))
    generation = {"eos_token_id": [6, 1, 10**9], "temperature": 0.6, "top_p": 0.95, "top_k": 0}
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.eos_id == byte_level.eos_id
    assert tokenizer.pad_id == byte_level.control_id("</think>")
    assert tokenizer.end_ids == (byte_level.eos_id, byte_level.control_id("<think>"), 5, 6)
    chosen = tokenizer.settings
    assert (chosen.temperature, chosen.top_k, chosen.top_p) == (0.6, None, 0.95)
    tokenizer.save(tmp_path / "run")
    again = pickle.loads(pickle.dumps(Tokenizer.load(tmp_path / "run")))  # noqa: S301 worker processes get it pickled
    assert again.settings == tokenizer.settings
    assert again.companions["chat_template.jinja"] == "{{ messages }}"
    assert json.loads(again.companions["model_tokens.json"]) == {"bos_token_id": 7, "eos_token_id": 5}
    assert again.fingerprint == byte_level.fingerprint


@pytest.mark.parametrize(
    ("generation", "temperature"),
    [({}, None), ({"do_sample": False}, 0.0), ({"do_sample": True}, 1.0), ({"temperature": 0.3}, 0.3)],
)
def test_temperature_of_the_authors(generation: dict[str, Any], temperature: float | None) -> None:
    companions = {"generation_config.json": json.dumps(generation)}
    assert Tokenizer(byte_tokenizer(), companions=companions).settings.temperature == temperature


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", "{", "not valid JSON"),
        ("tokenizer_config.json", '{"add_bos_token": "yes"}', "add_bos_token is 'yes'"),
        ("tokenizer_config.json", '{"bos_token": {"content": 3}}', "content is 3"),
        ("generation_config.json", '{"eos_token_id": ["a"]}', "eos_token_id is"),
        ("generation_config.json", '{"eos_token_id": -1}', "eos_token_id is"),
        ("generation_config.json", '{"temperature": "hot"}', "temperature is 'hot'"),
    ],
)
def test_settings_that_cannot_be_used_are_one_line(name: str, content: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Tokenizer(byte_tokenizer(), "my.json", {name: content})
    assert "\n" not in str(caught.value)
    assert "my.json" in str(caught.value)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["content", "x"]), inner, max_size=2),
    max_leaves=5,
)
_FIELDS = {
    "tokenizer_config.json": ["add_bos_token", "bos_token", "eos_token", "pad_token", "chat_template"],
    "generation_config.json": ["eos_token_id", "temperature", "top_k", "top_p", "do_sample"],
    "model_tokens.json": ["eos_token_id", "bos_token_id"],
}


@settings(max_examples=200, deadline=None)
@given(file=st.sampled_from(sorted(_FIELDS)), data=st.data())
def test_any_settings_are_taken_or_refused_in_a_line(file: str, data: st.DataObject) -> None:
    values = data.draw(st.dictionaries(st.sampled_from(_FIELDS[file]), _JSON))
    found, message = None, "my.json"
    try:
        found = read_settings({file: json.dumps(values)}, "my.json")
    except UserError as error:
        message = str(error)
    assert len(message) < 300
    assert "my.json" in message
    if found is not None:
        assert all(isinstance(index, int) and index >= 0 for index in found.end_ids)
        assert found.temperature is None or isinstance(found.temperature, float)
