"""A server with a random model over bytes, in a thread of this process."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

from small_models import small_model

from dsv3_jax.config import ModelConfig
from dsv3_jax.data import ChatTemplate, Tokenizer, plain_template
from dsv3_jax.data.tokenizer_training import byte_tokenizer
from dsv3_jax.inference import Engine, EngineConfig, Sampler
from dsv3_jax.serving.server import listen, serve
from dsv3_jax.serving.settings import ServedModel, ServerSettings

TOKENIZER = Tokenizer(byte_tokenizer())
SIZES = {"max_sequences": 4, "page_size": 4, "chunk_sizes": (16,), "steps": 3, "record_experts": True}


@dataclasses.dataclass(frozen=True)
class Small:
    """A running server: its address, its engine, and its model as clients see it."""

    url: str
    engine: Engine
    model: ServedModel


def small_engine(**sizes: Any) -> Engine:
    """Returns an engine whose untrained MTP module is sometimes right."""
    config = ModelConfig.preset("tiny", vocab_size=TOKENIZER.vocab_size, initializer_range=0.25)
    return Engine(small_model(config, 3), EngineConfig(**(SIZES | sizes)), to_bytes=TOKENIZER.to_bytes)


@contextlib.contextmanager
def running(engine: Engine, *, chat: bool = True, **settings: Any) -> Iterator[Small]:
    """Serves until the block ends; then the requests that run are served to their end."""
    template = ChatTemplate(plain_template(TOKENIZER), TOKENIZER) if chat else None
    model = ServedModel(
        name="small",
        note="step 7",
        tokenizer=TOKENIZER,
        template=template,
        sampler=Sampler(temperature=0.8, top_p=0.95),
    )
    listening = listen("127.0.0.1", 0)
    port = listening.getsockname()[1]
    stopping, ready = threading.Event(), threading.Event()

    def run() -> None:
        try:
            serve(engine, model, listening, ServerSettings(**settings), stop=stopping.is_set, started=ready.set)
        finally:
            ready.set()

    thread = threading.Thread(target=run, name="server", daemon=True)
    thread.start()
    assert ready.wait(60)
    try:
        yield Small(f"http://127.0.0.1:{port}", engine, model)
    finally:
        stopping.set()
        thread.join(60)
        assert not thread.is_alive(), "the server has not ended"
