"""What the operator of a server chooses, and the model that it serves."""

from __future__ import annotations

import dataclasses
import time

from dsv3_jax.data import ChatTemplate, Tokenizer
from dsv3_jax.inference import Sampler


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Limits of a server.

    Attributes:
      max_waiting: most completions that wait for the engine, beyond those that it runs.
      request_seconds: longest time of a request.
      body_bytes: largest body of a request.
      body_seconds: longest time in which a body must have come.
      api_key: what clients must send; None lets everyone in.
      local_only: whether requests must name this machine as their host, so that no web page of another site reaches a
        server that only listens on this machine (DNS rebinding).
    """

    max_waiting: int = 256
    request_seconds: float = 600.0
    body_bytes: int = 4 * 2**20
    body_seconds: float = 30.0
    api_key: str | None = None
    local_only: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model as clients see it.

    Attributes:
      name: its id in the API.
      note: what it is, in words, such as the checkpoint.
      tokenizer: its tokenizer.
      template: its chat template; None for a base model.
      sampler: how tokens are chosen where a request does not say.
      created: seconds since 1970.
    """

    name: str
    note: str
    tokenizer: Tokenizer
    template: ChatTemplate | None
    sampler: Sampler
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
