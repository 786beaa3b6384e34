"""`folovllm chat`: a conversation in the terminal, streamed, with an engine or with a server."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from folovllm.frontend.cli.conversation import Conversation, Piece, Speed, hold
from folovllm.frontend.cli.options import (
    GroupedCommand,
    complete_model,
    engine_options,
    option,
    sampling_options,
    taken_engine_options,
    taken_sampling_params,
)

if TYPE_CHECKING:
    from folovllm.common.sampling_params import SamplingParams
    from folovllm.frontend.llm import LLM
    from folovllm.frontend.openai_client import ChatDelta, OpenAIClient
    from folovllm.frontend.outputs import RequestMetrics

_EXAMPLES = (
    "folovllm chat demo",
    'folovllm chat demo --quick "What is the capital of France?"',
    'folovllm chat Qwen/Qwen3-0.6B --system "Answer in one sentence." --temperature 0.7',
    "folovllm chat --engine ipc:///tmp/engine.sock",
    "folovllm chat --url http://127.0.0.1:8000",
)
_MAX_TOKENS = 512  # a small model that repeats itself would otherwise fill its whole context
_TEMPERATURE = 0.2  # small models ramble at 1.0; 0.2 is what SmolLM2's authors use
_URL_HELP = "Talk with an OpenAI-compatible server; MODEL is its name there, or nothing: its first one."


@click.command(cls=GroupedCommand, examples=_EXAMPLES, short_help="Talks with MODEL in the terminal.")
@click.argument("model", required=False, shell_complete=complete_model)
@option("Conversation", "--engine", default=None, metavar="ENDPOINT", help="Use a running engine; MODEL is not needed.")
@option("Conversation", "--url", default=None, metavar="URL", help=_URL_HELP)
@option("Conversation", "--api-key", default=None, metavar="KEY", help="Key of the server at --url [none].")
@option("Conversation", "--quick", default=None, metavar="QUESTION", help="Answer this question and exit.")
@option("Conversation", "--ask", multiple=True, metavar="QUESTION", help="Ask this first; may be given several times.")
@option("Conversation", "--system", default=None, metavar="TEXT", help="System message.")
@option("Conversation", "--no-table", is_flag=True, help="Do not show the start-up table.")
@sampling_options
@engine_options
def chat(model: str | None, engine: str | None, url: str | None, **given: Any) -> None:
    """Talks with MODEL. Answers are streamed; the conversation is remembered.

    Commands within the conversation: /clear, /stats, /exit, /help. Ctrl-C stops an answer. Without a terminal on
    standard input, its lines are the questions. Where neither you nor the model says how to sample, the temperature
    is 0.2; an answer is cut at 512 tokens unless --max-tokens says otherwise.

    With --url nothing is started: any server that speaks OpenAI's chat API answers, and samples as it likes where no
    option says how.
    """
    _check(model, engine, url, given)
    params = taken_sampling_params(given, max_tokens=_MAX_TOKENS)
    if url is not None:
        _converse(_server(url, model, params, given["api_key"]), given)
        return
    from folovllm.frontend.llm import LLM

    with LLM(model, tokenizer=given["tokenizer"], engine=engine, **taken_engine_options(given)) as llm:
        if given["quick"] is None and not given["no_table"]:
            click.echo(llm.startup.table() + "\n", err=True)
        _converse(EnginePartner(llm, _for_chat(params, llm)), given)


def _check(model: str | None, engine: str | None, url: str | None, given: dict[str, Any]) -> None:
    if model is None and engine is None and url is None:
        raise click.UsageError("give a MODEL (a folder, a hub id or 'demo'), --engine ENDPOINT, or --url URL")
    if given["quick"] is not None and given["ask"]:
        raise click.UsageError("--quick answers one question and exits; it does not go with --ask")
    if url is None and given["api_key"] is not None:
        raise click.UsageError("--api-key is the key of a server; give its --url too")
    if url is not None:
        of_engine = ["engine"] if engine else sorted(taken_engine_options(given))
        of_engine += ["tokenizer"] if given["tokenizer"] else []
        if of_engine:
            raise click.UsageError(f"{', '.join(of_engine)} cannot be given with --url: the server has its own engine")


def _converse(partner: "EnginePartner | ServerPartner", given: dict[str, Any]) -> None:
    conversation = Conversation(partner, given["system"])
    if given["quick"] is None:
        hold(conversation, given["ask"])
    elif not conversation.answer(given["quick"]):
        raise KeyboardInterrupt


class EnginePartner:
    """An engine that answers."""

    def __init__(self, llm: "LLM", params: "SamplingParams") -> None:
        self._llm = llm
        self._params = params

    @contextmanager
    def answer(self, messages: Sequence[dict[str, Any]]) -> Iterator[Iterator[Piece]]:
        with self._llm.stream_chat(list(messages), self._params) as outputs:
            yield (
                Piece(part.text, finish_reason=part.finish_reason, speed=_speed_of(output.metrics))
                for output in outputs
                for part in output.outputs
            )

    def stats(self) -> str:
        stats = self._llm.get_stats()
        return (
            f"engine:      {stats.num_running} running, {stats.num_waiting} waiting, "
            f"{stats.num_blocks - stats.num_free_blocks} of {stats.num_blocks} KV blocks in use, "
            f"{stats.num_prompt_tokens_total} prompt and {stats.num_output_tokens_total} output tokens so far"
        )


def _speed_of(metrics: "RequestMetrics | None") -> Speed | None:
    if metrics is None or not metrics.time_per_output_token or metrics.time_to_first_token is None:
        return None
    return Speed(metrics.num_generation_tokens, metrics.time_to_first_token, metrics.time_per_output_token)


def _for_chat(params: "SamplingParams", llm: "LLM") -> "SamplingParams":
    """Lowers the temperature where neither the user nor the model's generation_config.json says how to sample."""
    import msgspec

    from folovllm.common.sampling_params import SamplingParams

    neutral = SamplingParams(temperature=1.0, top_k=-1, top_p=1.0, min_p=0.0, repetition_penalty=1.0)
    chosen = (params.temperature, params.top_k, params.top_p, params.min_p)
    if llm.get_default_sampling_params() != neutral or chosen != (None, None, None, None):
        return params
    return msgspec.structs.replace(params, temperature=_TEMPERATURE)


class ServerPartner:
    """A model of a server that answers."""

    def __init__(self, client: "OpenAIClient", model: str, fields: dict[str, Any]) -> None:
        self._client = client
        self._model = model
        self._fields = fields

    @contextmanager
    def answer(self, messages: Sequence[dict[str, Any]]) -> Iterator[Iterator[Piece]]:
        began = time.perf_counter()
        with self._client.stream_chat(self._model, messages, self._fields) as deltas:
            yield _timed(deltas, began)

    def stats(self) -> str:
        return f"server:      {self._client.url}, model {self._model}"


def _timed(deltas: "Iterator[ChatDelta]", began: float) -> Iterator[Piece]:
    """Pieces of a stream; the one with the token count tells the speed, as the clock here has seen it."""
    first = last = 0.0
    for delta in deltas:
        if delta.text or delta.reasoning:
            last = time.perf_counter()
            first = first or last
        gaps = (delta.num_tokens or 0) - 1
        speed = Speed(gaps + 1, first - began, (last - first) / gaps) if gaps > 0 and last > first else None
        yield Piece(delta.text, delta.reasoning, delta.finish_reason, speed)


def _server(url: str, model: str | None, params: "SamplingParams", api_key: str | None) -> ServerPartner:
    from folovllm.frontend.openai_client import OpenAIClient
    from folovllm.frontend.sampling_fields import to_fields

    client = OpenAIClient(url, api_key)
    names = client.models()  # asked even where MODEL is given: here a wrong URL or key is told best
    return ServerPartner(client, model or names[0], to_fields(params))
