"""A conversation in the terminal, whoever answers: an engine, or a server."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import click

PROMPT = "you> "
_HELP = """\
  /clear   forget the conversation
  /stats   state of the engine, and speed of the last answer
  /exit    leave (or Ctrl-D, or Ctrl-C twice)
  /help    this list
Ctrl-C stops an answer."""


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast an answer came: its tokens, seconds to the first one, and seconds from each to the next."""

    num_tokens: int
    first_s: float
    per_token_s: float

    def __str__(self) -> str:
        first, rate = f"first after {self.first_s * 1000:.0f} ms", f"{1 / self.per_token_s:.1f} tokens/s"
        return f"{self.num_tokens} tokens, {first}, then {rate}"


@dataclass(frozen=True, slots=True)
class Piece:
    """What is new of an answer. Thoughts that come apart from the text are shown and not remembered."""

    text: str = ""
    reasoning: str = ""
    finish_reason: str | None = None
    speed: Speed | None = None


class Partner(Protocol):
    """Whoever answers."""

    def answer(self, messages: Sequence[dict[str, Any]]) -> AbstractContextManager[Iterator[Piece]]:
        """The answer to a conversation, as it comes. Leaving the block ends it."""

    def stats(self) -> str:
        """A line about its state."""


class Conversation:
    """The messages so far, and the commands on them."""

    def __init__(self, partner: Partner, system: str | None) -> None:
        self._partner = partner
        self._first = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self._first)
        self._speed: Speed | str = "no answer yet"

    def take(self, line: str) -> bool:
        """Answers a line of the user, or does what its command says. False: the user wants to leave."""
        if line == "/exit":
            return False
        if line == "/clear":
            self.messages = list(self._first)
            click.echo("(forgotten)")
        elif line == "/stats":
            click.echo(f"last answer: {self._speed}\n{self._partner.stats()}")
        elif line.startswith("/"):
            click.echo(_HELP if line == "/help" else f"{line.split()[0]} is not known:\n{_HELP}")
        elif line:
            self.answer(line)
        return True

    def answer(self, question: str) -> bool:
        """Prints the answer as it comes. Ctrl-C ends it (False); what came is remembered like a whole one."""
        self.messages.append({"role": "user", "content": question})
        texts: list[str] = []
        whole, cut = True, False
        try:
            with self._partner.answer(self.messages) as pieces:
                thinks = False
                for piece in pieces:
                    thinks = _show(piece, thinks)
                    texts.append(piece.text)
                    self._speed = piece.speed or self._speed
                    cut = cut or piece.finish_reason == "length"
        except KeyboardInterrupt:
            whole = False
            click.echo(" [stopped]", nl=False)
        except BaseException:
            self.messages.pop()
            raise
        click.echo()
        if cut:
            click.echo("(cut: --max-tokens, or the model's length, is reached)", err=True)
        self.messages.append({"role": "assistant", "content": "".join(texts)})
        return whole


def _show(piece: Piece, thinks: bool) -> bool:
    """Prints a piece, its thoughts dimmed; returns whether the last thing shown was a thought."""
    if piece.reasoning:
        click.echo(click.style(piece.reasoning, dim=True), nl=False)
        thinks = True
    if piece.text:
        click.echo(("\n\n" if thinks else "") + piece.text, nl=False)
        thinks = False
    return thinks


def hold(conversation: Conversation, first: Sequence[str]) -> None:
    """Asks the first questions, then those that are typed; without a terminal the lines of standard input."""
    for question in first:
        click.echo(f"{PROMPT}{question}")
        conversation.answer(question)
    if sys.stdin.isatty():
        _talk(conversation, _read_from_terminal())
    elif not first:
        _talk(conversation, lambda: sys.stdin.readline() or None)


def _talk(conversation: Conversation, read: Callable[[], str | None]) -> None:
    """Question and answer until the input ends; a refused question is told and the conversation goes on."""
    from folovllm.common.errors import RequestError

    while (line := read()) is not None:
        try:
            if not conversation.take(line.strip()):
                return
        except RequestError as error:
            click.echo(f"Error: {error}", err=True)


def _read_from_terminal() -> Callable[[], str | None]:
    """Reads lines with editing and history; Ctrl-C warns once, the second leaves."""
    import readline  # noqa: F401 - gives `input` its line editing

    click.echo("Type a message; /help lists the commands.")

    def read() -> str | None:
        for reminder in (" (Ctrl-C again, or /exit, leaves)", ""):
            try:
                return input(PROMPT)
            except EOFError:
                click.echo()
                return None
            except KeyboardInterrupt:
                click.echo(reminder)
        return None

    return read
