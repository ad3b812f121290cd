"""The command `dsv3 generate`."""

from __future__ import annotations

import argparse
import codecs
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from dsv3_jax.cli.options import notes
from dsv3_jax.errors import UserError

if TYPE_CHECKING:
    from dsv3_jax.data import Tokenizer
    from dsv3_jax.inference import Sampler

_DEFAULT_NEW_TOKENS = 128
_DESCRIPTION = """Write text with the newest checkpoint of a run.

example:
  dsv3 generate runs/nano --prompt "def main("
"""


class _Parser(argparse.ArgumentParser):
    """A parser that raises UserError for wrong arguments."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}; see {self.prog} --help")


def main(argv: list[str]) -> int:
    """Prints each prompt with its continuation and returns the exit code.

    Raises:
      UserError: the arguments are wrong, the run has no usable checkpoint, or a prompt does not fit the context.
    """
    arguments = _parse(argv)
    sampler = _sampler(arguments)
    # These imports are slow, so wrong arguments are reported before them.
    import jax

    from dsv3_jax.cli.compilation_cache import keep_compiled_programs
    from dsv3_jax.inference import complete, stream
    from dsv3_jax.runs.checkpoints import load_checkpoint

    keep_compiled_programs()
    with notes():
        model, tokenizer, _ = load_checkpoint(arguments.run)
    # In training an end-of-text token precedes every document, so it is what an empty prompt starts a document with.
    prompts = [tokenizer.encode(text) or [tokenizer.eos_id] for text in arguments.prompt]
    space = model.config.max_position_embeddings - max(map(len, prompts))
    new_tokens = arguments.max_new_tokens or max(1, min(_DEFAULT_NEW_TOKENS, space))
    key, stop = jax.random.key(arguments.seed), tokenizer.eos_id
    if len(prompts) == 1 and arguments.stream:
        steps = stream(model, prompts, new_tokens, sampler, key, stop_token=stop)
        _print_pieces(arguments.prompt[0], _decoded(tokenizer, (int(step[0]) for step in steps)))
        return 0
    texts = complete(model, prompts, new_tokens, sampler, key, stop_token=stop)
    for number, (prompt, ids) in enumerate(zip(arguments.prompt, texts, strict=True), start=1):
        if len(prompts) > 1:
            print(f"{'' if number == 1 else chr(10)}--- {number} ---")
        print(prompt + tokenizer.decode(ids))
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="dsv3 generate",
        description=_DESCRIPTION,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="folder of a training run")
    parser.add_argument(
        "--prompt",
        action="append",
        help="text to continue; give the option several times to continue several texts (default: an empty text)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        help=f"number of tokens to generate (default: {_DEFAULT_NEW_TOKENS}, or as many as fit the context)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        help="divides the logits before a token is drawn; 0 always takes the most likely token "
        "(default: 0, or 1 with --top-k or --top-p)",
    )
    parser.add_argument("--top-k", type=int, help="draw from the K most likely tokens (default: from all)")
    parser.add_argument(
        "--top-p",
        type=float,
        help="draw from the fewest most likely tokens whose probabilities sum to at least this (default: from all)",
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of the draws (default: 0)")
    parser.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="print tokens as they are generated (the default); with several prompts the texts are printed at the end",
    )
    arguments = parser.parse_args(argv)
    arguments.prompt = arguments.prompt or [""]
    if arguments.max_new_tokens is not None and arguments.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens must be at least 1, not {arguments.max_new_tokens}")
    return arguments


def _sampler(arguments: argparse.Namespace) -> Sampler:
    from dsv3_jax.inference.sampling import Sampler

    filtered = arguments.top_k is not None or arguments.top_p is not None
    temperature = arguments.temperature
    if temperature is None:
        temperature = 1.0 if filtered else 0.0
    return Sampler(temperature=temperature, top_k=arguments.top_k, top_p=arguments.top_p)


def _decoded(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Yields the text of ids as they come; a character made of several tokens is held back until it is complete."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in ids:
        if token == tokenizer.eos_id:
            break
        yield decoder.decode(tokenizer.to_bytes([token]))
    yield decoder.decode(b"", final=True)


def _print_pieces(prompt: str, pieces: Iterable[str]) -> None:
    sys.stdout.write(prompt)
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
