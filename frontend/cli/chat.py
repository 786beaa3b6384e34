"""`folovllm chat`: a conversation in the terminal, streamed."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from folovllm.frontend.cli.options import (
    GroupedCommand,
    engine_options,
    option,
    sampling_options,
    taken_engine_options,
    taken_sampling_params,
)

if TYPE_CHECKING:
    from folovllm.common.sampling_params import SamplingParams
    from folovllm.frontend.llm import LLM

_EXAMPLES = (
    "folovllm chat demo",
    'folovllm chat demo --quick "What is the capital of France?"',
    'folovllm chat Qwen/Qwen3-0.6B --system "Answer in one sentence." --temperature 0.7',
    "folovllm chat --engine ipc:///tmp/engine.sock",
)
_HELP = """\
  /clear   forget the conversation
  /stats   state of the engine, and speed of the last answer
  /exit    leave (or Ctrl-D, or Ctrl-C twice)
  /help    this list
Ctrl-C stops an answer."""
_PROMPT = "you> "
_MAX_TOKENS = 512  # a small model that repeats itself would otherwise fill its whole context
_TEMPERATURE = 0.2  # small models ramble at 1.0; 0.2 is what SmolLM2's authors use


@click.command(cls=GroupedCommand, examples=_EXAMPLES, short_help="Talks with MODEL in the terminal.")
@click.argument("model", required=False)
@option("Conversation", "--engine", default=None, metavar="ENDPOINT", help="Use a running engine; MODEL is not needed.")
@option("Conversation", "--quick", default=None, metavar="QUESTION", help="Answer this question and exit.")
@option("Conversation", "--ask", multiple=True, metavar="QUESTION", help="Ask this first; may be given several times.")
@option("Conversation", "--system", default=None, metavar="TEXT", help="System message.")
@option("Conversation", "--no-table", is_flag=True, help="Do not show the start-up table.")
@sampling_options
@engine_options
def chat(model: str | None, engine: str | None, quick: str | None, ask: tuple[str, ...], **given: Any) -> None:
    """Talks with MODEL. Answers are streamed; the conversation is remembered.

    Commands within the conversation: /clear, /stats, /exit, /help. Ctrl-C stops an answer. Without a terminal on
    standard input, its lines are the questions. Where neither you nor the model says how to sample, the temperature
    is 0.2; an answer is cut at 512 tokens unless --max-tokens says otherwise.
    """
    if model is None and engine is None:
        raise click.UsageError("give a MODEL (a folder, a hub id or 'demo'), or --engine ENDPOINT")
    if quick is not None and ask:
        raise click.UsageError("--quick answers one question and exits; it does not go with --ask")
    from folovllm.frontend.llm import LLM

    params = taken_sampling_params(given, max_tokens=_MAX_TOKENS)
    with LLM(model, tokenizer=given["tokenizer"], engine=engine, **taken_engine_options(given)) as llm:
        conversation = Conversation(llm, _for_chat(params, llm), given["system"])
        if quick is not None:
            if not conversation.answer(quick):
                raise KeyboardInterrupt
            return
        if not given["no_table"]:
            click.echo(llm.startup.table() + "\n", err=True)
        for question in ask:
            click.echo(f"{_PROMPT}{question}")
            conversation.answer(question)
        if sys.stdin.isatty():
            _talk(conversation, _read_from_terminal())
        elif not ask:
            _talk(conversation, lambda: sys.stdin.readline() or None)


class Conversation:
    """The messages so far, and the commands on them."""

    def __init__(self, llm: "LLM", params: "SamplingParams", system: str | None) -> None:
        self._llm = llm
        self._params = params
        self._first = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self._first)
        self._speed = "no answer yet"

    def take(self, line: str) -> bool:
        """Answers a line of the user, or does what its command says. False: the user wants to leave."""
        if line == "/exit":
            return False
        if line == "/clear":
            self.messages = list(self._first)
            click.echo("(forgotten)")
        elif line == "/stats":
            click.echo(self._stats())
        elif line.startswith("/"):
            click.echo(_HELP if line == "/help" else f"{line.split()[0]} is not known:\n{_HELP}")
        elif line:
            self.answer(line)
        return True

    def answer(self, question: str) -> bool:
        """Prints the answer as it comes. Ctrl-C ends it (False); what came is remembered like a whole one."""
        self.messages.append({"role": "user", "content": question})
        pieces: list[str] = []
        whole, cut = True, False
        try:
            with self._llm.stream_chat(self.messages, self._params) as outputs:
                for output in outputs:
                    pieces += [answer.text for answer in output.outputs]
                    click.echo(pieces[-1], nl=False)
                    self._note_speed(output.metrics)
                    cut = output.outputs[0].finish_reason == "length"
        except KeyboardInterrupt:
            whole = False
            click.echo(" [stopped]", nl=False)
        except BaseException:
            self.messages.pop()
            raise
        click.echo()
        if cut:
            click.echo("(cut: --max-tokens, or the model's length, is reached)", err=True)
        self.messages.append({"role": "assistant", "content": "".join(pieces)})
        return whole

    def _note_speed(self, metrics: Any) -> None:
        per_token = metrics.time_per_output_token
        first = metrics.time_to_first_token
        if per_token and first is not None:
            self._speed = (
                f"{metrics.num_generation_tokens} tokens, first after {first * 1000:.0f} ms, then "
                f"{1 / per_token:.1f} tokens/s"
            )

    def _stats(self) -> str:
        stats = self._llm.get_stats()
        return (
            f"last answer: {self._speed}\n"
            f"engine:      {stats.num_running} running, {stats.num_waiting} waiting, "
            f"{stats.num_blocks - stats.num_free_blocks} of {stats.num_blocks} KV blocks in use, "
            f"{stats.num_prompt_tokens_total} prompt and {stats.num_output_tokens_total} output tokens so far"
        )


def _for_chat(params: "SamplingParams", llm: "LLM") -> "SamplingParams":
    """Lowers the temperature where neither the user nor the model's generation_config.json says how to sample."""
    import msgspec

    from folovllm.common.sampling_params import SamplingParams

    neutral = SamplingParams(temperature=1.0, top_k=-1, top_p=1.0, min_p=0.0, repetition_penalty=1.0)
    chosen = (params.temperature, params.top_k, params.top_p, params.min_p)
    if llm.get_default_sampling_params() != neutral or chosen != (None, None, None, None):
        return params
    return msgspec.structs.replace(params, temperature=_TEMPERATURE)


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
                return input(_PROMPT)
            except EOFError:
                click.echo()
                return None
            except KeyboardInterrupt:
                click.echo(reminder)
        return None

    return read
