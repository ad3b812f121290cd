"""The command `dsv3 chat`: a chat with a model in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from dsv3_jax.bounds import LARGEST_SEED
from dsv3_jax.cli.options import OptionParser, add_weight_formats, number, suggest
from dsv3_jax.errors import UserError
from dsv3_jax.terminal import printable, say

if TYPE_CHECKING:
    from dsv3_jax.data import ChatTemplate, Tokenizer
    from dsv3_jax.inference import Engine, Result, Sampler

_DESCRIPTION = """Chat with a run's newest checkpoint, or with a published checkpoint.

A model without a chat template goes on with the text that is typed, as it was trained to.

In the chat:
  /new                  begin a new chat
  /set NAME VALUE       change temperature, top-p, top-k, min-p, max-new-tokens, seed, or system (a text)
  /settings             show the settings
  /help, /quit
Ctrl-C stops an answer, and ends the program where there is none; so does Ctrl-D.
"""
_COMMANDS = ["/new", "/set", "/settings", "/help", "/quit"]
_READ = {
    "temperature": number(float, 0, 1e6),
    "top_p": number(float, 0, 1),
    "top_k": number(int, 1, 2**24),
    "min_p": number(float, 0, 1),
    "max_new_tokens": number(int, 1, 2**24),
    "seed": number(int, 0, LARGEST_SEED),
}
_TEXTS = {
    "temperature": "divides the logits before a token is drawn",
    "top_p": "draw from the fewest most likely tokens whose probabilities sum to at least this",
    "top_k": "draw from the K most likely tokens",
    "min_p": "draw from tokens of at least this times the probability of the most likely one",
    "max_new_tokens": "most tokens of an answer",
    "seed": "random seed of the draws",
}


def main(argv: list[str]) -> int:
    """Chats until the user quits; returns the exit code.

    Raises:
      UserError: the arguments are wrong, or the run has no usable checkpoint.
    """
    arguments = _parse(argv)
    # These imports are slow, so wrong arguments are reported before them.
    from dsv3_jax.cli.models import default_sampler, load_model
    from dsv3_jax.data import ChatTemplate
    from dsv3_jax.inference import Engine, EngineConfig

    loaded = load_model(arguments.run, arguments.dtype)
    config = EngineConfig(max_sequences=1, steps=2, top_logprobs=0, int8_weights=arguments.int8, compile_at_start=False)
    engine = Engine(loaded.model, config, to_bytes=loaded.tokenizer.to_bytes)
    sampler = default_sampler(loaded.tokenizer)
    chat = Chat(engine, loaded.tokenizer, ChatTemplate.of(loaded.tokenizer), sampler)
    for name in _READ:
        if (value := getattr(arguments, name)) is not None:
            chat.set(name, value)
    chat.system = arguments.system or ""
    say(f"{arguments.run.resolve().name}, {loaded.note}. /help shows the commands, /quit ends.")
    if chat.template is None:
        say("This is a base model without a chat template: it goes on with your text.")
    with _CtrlC() as ctrl_c:
        _talk(chat, ctrl_c)
    return 0


def _talk(chat: Chat, ctrl_c: _CtrlC) -> None:
    """Reads lines and answers them until the user quits."""
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            say("")
            return
        if line.startswith("/") and (chat.template is not None or line.split()[0] in _COMMANDS):
            try:
                if not chat.command(line):
                    return
            except UserError as error:
                say(str(error))
        elif line.strip():
            with ctrl_c.noted():
                chat.say(line, ctrl_c)


class _CtrlC:
    """A context manager under which Ctrl-C is only noted while the model answers, and else raises KeyboardInterrupt.

    An exception in the middle of a step of the engine would lose its arrays. A second Ctrl-C does not wait.
    """

    def __init__(self) -> None:
        self.pressed = False
        self._noting = False

    def __enter__(self) -> _CtrlC:
        self._wakeup = signal.set_wakeup_fd(-1)  # of the program's own handling, which ends at the second Ctrl-C
        self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)
        signal.set_wakeup_fd(self._wakeup)

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Notes Ctrl-C in `pressed` while the block runs."""
        self.pressed, self._noting = False, True
        try:
            yield
        finally:
            self._noting = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.pressed or not self._noting:
            raise KeyboardInterrupt
        self.pressed = True


class Chat:
    """A chat: its messages or its text, and its settings.

    Attributes:
      template: None if the model goes on with plain text.
      system: text before the first message.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, template: ChatTemplate | None, sampler: Sampler):
        self.template = template
        self.system = ""
        self._engine, self._tokenizer, self._sampler = engine, tokenizer, sampler
        self._max_new_tokens: int | None = None
        self._seed = 0
        self._messages: list[dict[str, str]] = []
        self._ids: list[int] = []  # of the text that a base model goes on with

    def command(self, line: str) -> bool:
        """Carries out a line that begins with a slash; returns whether the chat goes on.

        Raises:
          UserError: there is no such command or setting, or the value cannot be used.
        """
        name, _, rest = line.strip().partition(" ")
        if name == "/quit":
            return False
        if name == "/new":
            self._messages, self._ids = [], []
            say("A new chat.")
        elif name == "/help":
            say(_DESCRIPTION.partition("In the chat:\n")[2].rstrip())
        elif name == "/settings":
            chosen = {key: getattr(self._sampler, key) for key in ("temperature", "top_p", "top_k", "min_p")}
            chosen |= {"max_new_tokens": self._max_new_tokens, "seed": self._seed, "system": self.system}
            say("\n".join(f"{key.replace('_', '-'):14s} {value}" for key, value in chosen.items()))
        elif name == "/set":
            self._set(*rest.partition(" ")[::2])
        else:
            raise UserError(f"there is no command {name}; {suggest(name, _COMMANDS)}")
        return True

    def set(self, name: str, value: float) -> None:
        """Changes a setting of the answers."""
        if name == "max_new_tokens":
            self._max_new_tokens = int(value)
        elif name == "seed":
            self._seed = int(value)
        else:
            self._sampler = dataclasses.replace(self._sampler, **{name: value})

    def say(self, text: str, ctrl_c: _CtrlC) -> None:
        """Sends a message and prints the answer as it comes, until Ctrl-C is pressed.

        What is wrong with the message is printed in a line, and the message is taken back.
        """
        from dsv3_jax.inference import Request

        try:
            if self.template is None:
                ids = self._tokenizer.encode(text, control_tokens=True)
                prompt = self._ids + ids if self._ids else self._tokenizer.prompt_ids(text)
            else:
                system = [{"role": "system", "content": self.system}] if self.system else []
                messages = [*self._messages, {"role": "user", "content": text}]
                prompt = self.template.prompt([*system, *messages])
            space = self._engine.context - len(prompt)
            if space < 1:
                raise UserError(
                    f"the chat has {len(prompt)} tokens but the model's context is {self._engine.context}; "
                    "begin a new one with /new"
                )
            request = Request(
                prompt=tuple(prompt),
                max_new_tokens=min(self._max_new_tokens or space, space),
                sampler=self._sampler,
                seed=self._seed,
                stop_tokens=self._tokenizer.end_ids,
            )
            number = self._engine.submit(request)
        except UserError as error:
            say(str(error))
            return
        answer = self._answer(number, ctrl_c)
        self._seed += 1  # so that the same message gets another answer
        if self.template is None:
            self._ids = prompt + [token for token in answer.tokens if token not in self._tokenizer.end_ids]
        else:
            self._messages = [*messages, {"role": "assistant", "content": answer.text}]

    def _set(self, name: str, value: str) -> None:
        key = name.strip("-").replace("-", "_")
        if key == "system":
            self.system = value
        elif key not in _READ:
            raise UserError(f"there is no setting '{name}'; {suggest(name, [*_READ, 'system'])}")
        else:
            try:
                self.set(key, _READ[key](value))
            except argparse.ArgumentTypeError as error:
                raise UserError(f"{name} {error}") from None

    def _answer(self, number: int, ctrl_c: _CtrlC) -> Result:
        """Prints a request's text as it comes and returns what was written."""
        from dsv3_jax.inference import Result

        result = Result()
        while self._engine.has_work:
            for output in self._engine.step():
                result.add(output)
                sys.stdout.write(printable(output.text))
                sys.stdout.flush()
            if ctrl_c.pressed and self._engine.has_work:
                self._engine.cancel(number)
                sys.stdout.write(" [stopped]")
        sys.stdout.write("\n")
        return result


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = OptionParser("dsv3 chat", _DESCRIPTION)
    parser.add_argument("run", type=Path, help="folder of a training run, or of a published checkpoint")
    add_weight_formats(parser)
    parser.add_argument("--system", help="text before the first message")
    for name, read in _READ.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=read, help=f"{_TEXTS[name]}; /set changes it")
    return parser.parse_args(argv)
