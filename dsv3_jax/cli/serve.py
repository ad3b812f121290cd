"""The command `dsv3 serve`: an HTTP server with OpenAI's API and a chat page."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

from dsv3_jax.cli.models import add_sets
from dsv3_jax.cli.options import OptionParser, add_weight_formats, number
from dsv3_jax.errors import UserError
from dsv3_jax.regular_files import read_regular
from dsv3_jax.terminal import say

_CACHE_TOKENS = 2**17  # of the cache, unless one request may be longer
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_DESCRIPTION = """Serve a run's newest checkpoint, or a published checkpoint, over HTTP: OpenAI's API and a chat page.

examples:
  dsv3 serve runs/nano                            then open http://127.0.0.1:8000
  dsv3 serve runs/nano --host 0.0.0.0 --api-key-file key.txt
  curl http://127.0.0.1:8000/v1/completions -H 'content-type: application/json' -d '{"prompt": "def main("}'
"""


def main(argv: list[str]) -> int:
    """Serves until SIGTERM or Ctrl-C, then lets running requests end; returns the exit code.

    Raises:
      UserError: the arguments are wrong, the port is in use, or the run has no usable checkpoint.
    """
    arguments = _parse(argv)
    key = None if arguments.api_key_file is None else _key(arguments.api_key_file)
    if missing := [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]:
        raise UserError(f"dsv3 serve needs {' and '.join(missing)}; install the extra: pip install 'dsv3-jax[serve]'")
    # These imports are slow, so wrong arguments are reported before them; so is a port in use.
    from dsv3_jax.serving.server import listen

    with listen(arguments.host, arguments.port) as listening:
        from dsv3_jax.cli.models import default_sampler, load_model, sets_of
        from dsv3_jax.data import ChatTemplate
        from dsv3_jax.inference import Engine, EngineConfig
        from dsv3_jax.runs.interruption import Interruption
        from dsv3_jax.serving.server import serve
        from dsv3_jax.serving.settings import ServedModel, ServerSettings

        sets = sets_of(arguments)
        loaded = load_model(arguments.run, arguments.dtype, sets=sets)
        model = ServedModel(
            name=arguments.model_name or arguments.run.resolve().name,
            note=loaded.note,
            tokenizer=loaded.tokenizer,
            template=ChatTemplate.of(loaded.tokenizer),
            sampler=default_sampler(loaded.tokenizer),
        )
        context = arguments.context or loaded.model.config.max_position_embeddings
        tokens = max(context, min(arguments.max_sequences * context, _CACHE_TOKENS))
        config = EngineConfig(
            max_sequences=arguments.max_sequences,
            context=arguments.context,
            cache_tokens=tokens if arguments.cache_gib is None else None,
            cache_memory=None if arguments.cache_gib is None else int(arguments.cache_gib * 2**30),
            drafts=arguments.drafts,
            int8_weights=arguments.int8,
            record_experts=arguments.experts,
            sets=sets,
            micro_batches=arguments.micro_batches,
        )
        engine = Engine(loaded.model, config, to_bytes=loaded.tokenizer.to_bytes, progress=_progress)
        settings = ServerSettings(
            max_waiting=arguments.max_waiting,
            request_seconds=arguments.request_seconds,
            api_key=key,
            local_only=arguments.host in _LOOPBACK,
        )
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host

        def started() -> None:
            chat = "" if model.template else "; it has no chat template: /v1/completions only"
            say(f"serving {model.name} ({model.note}) on http://{shown}:{port}{chat}")
            if not settings.local_only and key is None:
                say("dsv3: note: everyone who reaches this address can use it; see --api-key-file", to=sys.stderr)

        with Interruption() as interruption:
            interruption.defer = interruption.unsaved = True
            serve(engine, model, listening, settings, stop=lambda: interruption.requested, started=started)
    say("stopped", to=sys.stderr)
    return 0


def _progress(number: int, total: int, what: str) -> None:
    say(f"compiling {number + 1} of {total}: {what}", to=sys.stderr)


def _key(path: Path) -> str:
    try:
        key = read_regular(path, max_bytes=10_000).decode("ascii").strip()
    except UnicodeDecodeError:
        key = ""
    if not key or not key.isprintable() or " " in key:
        raise UserError(f"{path} must hold a key: ASCII characters without spaces, on one line")
    return key


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = OptionParser("dsv3 serve", _DESCRIPTION)
    parser.add_argument("run", type=Path, help="folder of a training run, or of a published checkpoint")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine alone)"
    )
    parser.add_argument(
        "--port", type=number(int, 0, 65535), default=8000, help="0 takes any that is free (default: 8000)"
    )
    parser.add_argument("--api-key-file", type=Path, help="file with the key that clients must send as bearer token")
    parser.add_argument("--model-name", help="name of the model in the API (default: the folder's)")
    add_weight_formats(parser)
    parser.add_argument(
        "--max-sequences", type=number(int, 1, 4096), default=16, help="requests that run at a time (default: 16)"
    )
    parser.add_argument(
        "--max-waiting", type=number(int, 0, 10**6), default=256, help="requests that may wait (default: 256)"
    )
    parser.add_argument("--context", type=number(int, 1, 2**24), help="most tokens of a request (default: the model's)")
    parser.add_argument(
        "--cache-gib",
        type=number(float, 1e-6, 1e6),
        help="memory of the cache (default: for all requests at full length, or for 131,072 tokens if that is less)",
    )
    parser.add_argument(
        "--drafts", type=number(int, 0, 16), help="tokens that the MTP module drafts (default: 1 if the model has one)"
    )
    parser.add_argument(
        "--experts",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="record the experts that tokens choose, for the chat page (the default)",
    )
    parser.add_argument(
        "--request-seconds", type=number(float, 1, 1e6), default=600, help="longest time of a request (default: 600)"
    )
    add_sets(parser)
    parser.add_argument(
        "--micro-batches",
        type=number(int, 1, 2),
        default=1,
        help="2 reads prompts as two micro-batches, one of which is sent to its experts while the other is multiplied; "
        "for meshes whose expert axis is larger than 1 (default: 1)",
    )
    return parser.parse_args(argv)
