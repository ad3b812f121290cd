"""Checks the server with OpenAI's own client, against the engine alone."""

from __future__ import annotations

import time

import httpx
import pytest
from small_server import TOKENIZER, Small

from dsv3_jax.data.control_tokens import ASSISTANT
from dsv3_jax.inference import Request, Result, Sampler

pytestmark = pytest.mark.slow

openai = pytest.importorskip("openai", reason="openai comes with the extra `dev`")

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "né?"}]
SAMPLER = Sampler(temperature=1.1, top_p=0.9, presence_penalty=0.5, frequency_penalty=0.2, logit_bias=((65, 2.0),))
SAMPLED = {
    "temperature": 1.1,
    "top_p": 0.9,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.2,
    "logit_bias": {"65": 2.0},
    "seed": 5,
}


@pytest.fixture(scope="module")
def client(server: Small):
    """Returns OpenAI's client of the server."""
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def alone(server: Small, prompt: list[int], sampler: Sampler, new: int, **settings) -> Result:
    """Returns what another engine with the same model, which runs nothing else, writes."""
    from small_server import small_engine

    request = Request(
        prompt=tuple(prompt), max_new_tokens=new, sampler=sampler, stop_tokens=TOKENIZER.end_ids, **settings
    )
    return small_engine(compile_at_start=False).run([request])[0]


def test_models(client, server: Small) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.owned_by, model.max_model_len) == ("small", "dsv3-jax", server.engine.context)
    assert client.models.retrieve("small") == model
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("large")


def test_completion(client, server: Small) -> None:
    prompt = TOKENIZER.encode("def f(")
    want = alone(server, prompt, SAMPLER, 20, seed=5, top_logprobs=2)
    for given in ("def f(", prompt, [prompt]):
        answer = client.completions.create(model="small", prompt=given, max_tokens=20, logprobs=2, **SAMPLED)
        (choice,) = answer.choices
        assert (choice.text, choice.finish_reason) == (want.text, want.finished)
        assert choice.logprobs.token_logprobs == pytest.approx([each.logprob for each in want.logprobs])
        assert choice.logprobs.tokens == [TOKENIZER.decode([token]) for token in want.tokens]
        assert [max(top.values()) for top in choice.logprobs.top_logprobs] == [each.top[0][1] for each in want.logprobs]
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (6, len(want.tokens))
        assert answer.usage.total_tokens == 6 + len(want.tokens)


def test_a_stream_is_the_whole_answer_in_pieces(client) -> None:
    options = {"model": "small", "messages": MESSAGES, "max_tokens": 30, "n": 2, "logprobs": True, "top_logprobs": 1}
    whole = client.chat.completions.create(**options, **SAMPLED)
    stream = client.chat.completions.create(**options, **SAMPLED, stream=True, stream_options={"include_usage": True})
    *chunks, last = list(stream)
    assert (last.choices, last.usage) == ([], whole.usage)
    texts, ends, scores = ["", ""], [None, None], [[], []]
    for chunk in chunks:
        for choice in chunk.choices:
            assert ends[choice.index] is None
            texts[choice.index] += choice.delta.content
            ends[choice.index] = choice.finish_reason
            scores[choice.index] += choice.logprobs.content if choice.logprobs else []
    assert texts == [choice.message.content for choice in whole.choices]
    assert ends == [choice.finish_reason for choice in whole.choices]
    assert scores == [choice.logprobs.content for choice in whole.choices]
    assert [chunk.choices[0].delta.role for chunk in chunks[:2]] == ["assistant", "assistant"]
    assert texts[0] != texts[1]  # each choice draws by its own seed


def test_a_chat_is_its_template(client, server: Small) -> None:
    prompt = server.model.template.prompt(MESSAGES)
    want = alone(server, prompt, SAMPLER, 16, seed=5)
    parts = [
        *MESSAGES[:-1],
        {"role": "user", "content": [{"type": "text", "text": "né"}, {"type": "text", "text": "?"}]},
    ]
    for messages in (MESSAGES, parts, [{"role": "developer", "content": "Be brief."}, MESSAGES[1]]):
        answer = client.chat.completions.create(model="small", messages=messages, max_completion_tokens=16, **SAMPLED)
        assert answer.choices[0].message.content == want.text
        assert answer.usage.prompt_tokens == len(prompt)


def test_a_chat_may_fill_the_context_and_a_completion_has_sixteen_tokens(client, server: Small) -> None:
    bias = {str(token): -100 for token in TOKENIZER.end_ids}
    answer = client.chat.completions.create(model="small", messages=MESSAGES, logit_bias=bias)
    assert answer.usage.total_tokens == server.engine.context
    assert answer.choices[0].finish_reason == "length"
    assert client.completions.create(model="small", prompt="a", logit_bias=bias).usage.completion_tokens == 16


def test_stop_strings_and_stop_tokens(client, server: Small) -> None:
    free = client.completions.create(model="small", prompt="a", max_tokens=40, **SAMPLED).choices[0].text
    stop = free[6:8]
    for given in (stop, [stop, "never there"]):
        choice = client.completions.create(model="small", prompt="a", max_tokens=40, stop=given, **SAMPLED).choices[0]
        assert (choice.text, choice.finish_reason) == (free[: free.index(stop)], "stop")
    end = {str(TOKENIZER.eos_id): 100.0}
    answer = client.chat.completions.create(model="small", messages=MESSAGES, logit_bias=end, logprobs=True)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("", "stop")
    assert answer.choices[0].logprobs.content == []


def test_several_prompts(client) -> None:
    answer = client.completions.create(model="small", prompt=["a", "b"], max_tokens=5, n=2, **SAMPLED)
    single = [client.completions.create(model="small", prompt=p, max_tokens=5, n=2, **SAMPLED) for p in "ab"]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices] == [choice.text for one in single for choice in one.choices]


def test_names_of_control_tokens_in_prompts_are_text(client) -> None:
    answer = client.completions.create(model="small", prompt=ASSISTANT, max_tokens=1)
    assert answer.usage.prompt_tokens == len(ASSISTANT.encode())


def test_seeds(client) -> None:
    options = {"model": "small", "prompt": "a", "max_tokens": 20}
    texts = {client.completions.create(**options).choices[0].text for _ in range(3)}
    assert len(texts) > 1, "without a seed every request draws anew"
    fixed = {client.completions.create(**options, seed=-3).choices[0].text for _ in range(2)}
    assert len(fixed) == 1


def test_details_of_tokens(client, server: Small) -> None:
    prompt = server.model.template.prompt(MESSAGES)
    want = alone(server, prompt, SAMPLER, 24, seed=5)
    stream = client.chat.completions.create(
        model="small", messages=MESSAGES, max_tokens=24, stream=True, extra_body={"token_details": True}, **SAMPLED
    )
    details = [each for chunk in stream for each in getattr(chunk.choices[0], "token_details", None) or []]
    count = len(want.tokens) - (want.finished == "stop")
    assert [each["drafted"] for each in details] == want.drafted[:count]
    assert [each["experts_before"] for each in details] == [e.tolist() for e in want.experts[len(prompt) - 1 :]][:count]
    assert "".join(each["text"] for each in details) == TOKENIZER.decode(want.tokens[:count])
    assert any(want.drafted)


def metrics(server: Small) -> dict[str, float]:
    lines = httpx.get(server.url + "/metrics").text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def test_metrics(client, server: Small) -> None:
    before = metrics(server)
    answer = client.completions.create(model="small", prompt="a b c", max_tokens=20, temperature=0)
    after = metrics(server)
    # The engine's state is recorded after the step in which the answer was given.
    until = time.monotonic() + 10
    while after["dsv3_requests_running"] and time.monotonic() < until:
        after = metrics(server)
    assert after["dsv3_pages"] == after["dsv3_pages_free"] == server.engine.sizes.pages
    assert after["dsv3_written_tokens_total"] - before["dsv3_written_tokens_total"] == answer.usage.completion_tokens
    end = f'dsv3_requests_total{{end="{answer.choices[0].finish_reason}"}}'
    assert after[end] == before.get(end, 0) + 1
    for name in ("first_token", "request"):
        count = f"dsv3_{name}_seconds_count"
        assert after[count] == before[count] + 1
        assert after[f'dsv3_{name}_seconds_bucket{{le="+Inf"}}'] == after[count]
        assert after[f"dsv3_{name}_seconds_sum"] > before[f"dsv3_{name}_seconds_sum"]
    drafted = 'dsv3_drafted_tokens_total{position="1"}'
    assert after[drafted] > before[drafted]
    assert after['dsv3_accepted_tokens_total{position="1"}'] <= after[drafted]
    load = {name: value for name, value in after.items() if name.startswith("dsv3_expert_tokens_total{")}
    assert sum(load.values()) == server.engine.expert_load.sum()
    assert after["dsv3_tokens_per_second"] > 0


def test_health_and_page(server: Small) -> None:
    assert httpx.get(server.url + "/health").json() == {"status": "ok"}
    page = httpx.get(server.url + "/")
    assert page.headers["content-type"].startswith("text/html")
    assert "http://" not in page.text
    assert "https://" not in page.text  # nothing is loaded from elsewhere
