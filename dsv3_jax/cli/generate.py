"""The command `dsv3 generate`."""

from __future__ import annotations

import argparse
import codecs
import itertools
import os
import select
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from dsv3_jax.bounds import LARGEST_SEED
from dsv3_jax.cli.models import add_sets
from dsv3_jax.cli.options import OptionParser, add_weight_formats, number
from dsv3_jax.errors import UserError
from dsv3_jax.regular_files import read_regular
from dsv3_jax.terminal import printable

if TYPE_CHECKING:
    from dsv3_jax.data import Tokenizer
    from dsv3_jax.inference import Sampler

_DEFAULT_NEW_TOKENS = 128
_LARGEST_PROMPT = 2**26  # bytes
_WAIT = 0.2  # seconds for text on standard input
_DESCRIPTION = """Write text with the newest checkpoint of a run.

example:
  dsv3 generate runs/nano --prompt "def main("
"""


def main(argv: list[str]) -> int:
    """Prints each prompt with its continuation and returns the exit code.

    Raises:
      UserError: the arguments are wrong, the run has no usable checkpoint, or a prompt does not fit the context.
    """
    arguments = _parse(argv)
    _sampler(arguments, None)
    # These imports are slow, so wrong arguments are reported before them.
    import jax

    from dsv3_jax.cli.models import load_model, sets_of
    from dsv3_jax.inference import complete, stream

    sets = sets_of(arguments)
    loaded = load_model(arguments.run, arguments.dtype, arguments.step, sets)
    model, tokenizer = loaded.model, loaded.tokenizer
    sampler = _sampler(arguments, tokenizer)
    texts = [_standard_input() if text == "-" else text for text in arguments.prompt or []]
    if arguments.prompt_file is not None:
        texts.append(_text_of(read_regular(arguments.prompt_file, max_bytes=_LARGEST_PROMPT), arguments.prompt_file))
    prompts = [tokenizer.prompt_ids(text, control_tokens=arguments.control_tokens) for text in texts]
    space = model.config.max_position_embeddings - max(map(len, prompts))
    new_tokens = arguments.max_new_tokens or max(1, min(_DEFAULT_NEW_TOKENS, space))
    key = jax.random.key(arguments.seed)
    how: dict[str, Any] = {"stop_token": tokenizer.end_ids, "sets": sets, "int8_weights": arguments.int8}
    shown = printable if sys.stdout.isatty() else str
    if len(prompts) == 1 and arguments.stream:
        steps = stream(model, prompts, new_tokens, sampler, key, **how)
        pieces = _decoded(tokenizer, (int(step[0]) for step in steps))
        _print_pieces(map(shown, itertools.chain([texts[0]], pieces)))
        return 0
    written = complete(model, prompts, new_tokens, sampler, key, **how)
    for count, (prompt, ids) in enumerate(zip(texts, written, strict=True), start=1):
        if len(prompts) > 1:
            print(f"{'' if count == 1 else chr(10)}--- {count} ---")
        print(shown(prompt + tokenizer.decode(ids)))
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = OptionParser("dsv3 generate", _DESCRIPTION, unknown="a prompt is given with --prompt")
    parser.add_argument("run", type=Path, help="folder of a training run")
    parser.add_argument(
        "--prompt",
        action="append",
        help="text to continue, or - for standard input; give the option several times to continue several texts "
        "(default: standard input if it is no terminal and holds text, else an empty text)",
    )
    parser.add_argument("--prompt-file", type=Path, help="file with a text to continue (UTF-8)")
    parser.add_argument(
        "--control-tokens",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="names of control tokens in a prompt, such as <｜User｜>, stand for these tokens (the default)",
    )
    parser.add_argument("--step", type=number(int, 0, 10**18), help="step of the checkpoint (default: the newest)")
    add_weight_formats(parser)
    parser.add_argument(
        "--max-new-tokens",
        type=number(int, 1, 2**24),
        help=f"number of tokens to generate (default: {_DEFAULT_NEW_TOKENS}, or as many as fit the context)",
    )
    parser.add_argument(
        "--temperature",
        type=number(float, 0, 1e6),
        help="divides the logits before a token is drawn; 0 always takes the most likely token "
        "(default: what the authors of an imported model say, else 0.8 with --top-p 0.95; 1 with --top-k or --top-p)",
    )
    parser.add_argument(
        "--top-k", type=number(int, 1, 2**24), help="draw from the K most likely tokens (default: from all)"
    )
    parser.add_argument(
        "--top-p",
        type=number(float, 0, 1),
        help="draw from the fewest most likely tokens whose probabilities sum to at least this (default: from all)",
    )
    parser.add_argument(
        "--seed", type=number(int, 0, LARGEST_SEED), default=0, help="random seed of the draws (default: 0)"
    )
    parser.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="print tokens as they are generated (the default); with several prompts the texts are printed at the end",
    )
    add_sets(parser)
    arguments = parser.parse_args(argv)
    if not arguments.prompt and arguments.prompt_file is None:
        arguments.prompt = ["-"] if _is_given(sys.stdin) else [""]
    return arguments


def _is_given(stream: TextIO | None) -> bool:
    """Returns whether standard input is a file, or a pipe with something in it. (Schedulers leave empty pipes open.)"""
    try:
        assert stream is not None
        mode = os.fstat(stream.fileno()).st_mode
        return stat.S_ISREG(mode) or (stat.S_ISFIFO(mode) and bool(select.select([stream], [], [], _WAIT)[0]))
    except (AssertionError, OSError, ValueError):
        return False


def _standard_input() -> str:
    return _text_of(sys.stdin.buffer.read(_LARGEST_PROMPT), "standard input")


def _text_of(data: bytes, source: Path | str) -> str:
    """Returns a text without the line break that `echo` and editors add at the end."""
    try:
        return data.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"the text of {source} is not UTF-8 at byte {error.start}") from None


def _sampler(arguments: argparse.Namespace, tokenizer: Tokenizer | None) -> Sampler:
    """Returns how tokens are chosen: as the options say, else as the authors of the checkpoint do."""
    from dsv3_jax.cli.models import default_sampler
    from dsv3_jax.inference import DEFAULT, Sampler

    top_k, top_p, temperature = arguments.top_k, arguments.top_p, arguments.temperature
    if temperature is None and top_k is None and top_p is None:
        return DEFAULT if tokenizer is None else default_sampler(tokenizer)
    return Sampler(temperature=1.0 if temperature is None else temperature, top_k=top_k, top_p=top_p)


def _decoded(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Yields the text of ids as they come; a character made of several tokens is held back until it is complete."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in ids:
        if token in tokenizer.end_ids:
            break
        yield decoder.decode(tokenizer.to_bytes([token]))
    yield decoder.decode(b"", final=True)


def _print_pieces(pieces: Iterable[str]) -> None:
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
