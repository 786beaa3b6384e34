"""Asks the engine: a job in, RequestOutputs out, counted for `/metrics`.

Outputs hold what is new. Several jobs of one HTTP request run at once (`merged`); a stream may ask for some tokens at a
time (`in_portions`); who wants the whole joins them (`whole`).
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import cast

from folovllm.common.errors import FoloVLLMError
from folovllm.common.sampling_params import SamplingParams
from folovllm.frontend.outputs import CompletionOutput, Logprob, RequestOutput
from folovllm.frontend.prompts import Prompt, RenderedChat
from folovllm.frontend.server.context import ServerContext
from folovllm.frontend.server.errors import to_api_error
from folovllm.frontend.server.spans import SpanOrigin

_LONG_TEXT = 20_000  # characters; up to here the tokenizer takes some milliseconds, which the others can wait

Outputs = AsyncGenerator[RequestOutput, None]


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt that is to be answered."""

    prompt: Prompt
    params: SamplingParams
    request_id: str
    priority: int = 0
    origin: SpanOrigin | None = None  # for its span; None makes none


async def answer(context: ServerContext, job: Job) -> Outputs:
    """The engine's outputs to a job, until it has ended; closing it aborts the job. Raises as `AsyncLLM.generate`."""
    metrics = context.metrics
    reasons: list[str] = []
    last_s = 0.0
    span = context.spans.begin(job.origin, job.request_id, job.params) if context.spans and job.origin else None
    try:
        context.begin(job.request_id)
        generated = context.llm.generate(job.prompt, job.params, request_id=job.request_id, priority=job.priority)
        async with aclosing(generated) as outputs:
            async for output in outputs:
                now = time.monotonic()
                if last_s:
                    metrics.observe_gap(now - last_s)
                elif output.metrics is not None and output.metrics.time_to_first_token is not None:
                    metrics.observe_first_token(output.metrics.time_to_first_token)
                last_s = now
                reasons += [part.finish_reason for part in output.outputs if part.finish_reason is not None]
                if output.finished:
                    metrics.observe_end(output, reasons)
                    if span is not None:
                        span.ended(output, reasons)
                yield output
    except FoloVLLMError as error:
        metrics.count_rejected(to_api_error(error).status)
        if span is not None:
            span.failed(error)
        raise
    finally:
        context.end(job.request_id)
        if span is not None:
            span.close()


async def to_prompt(
    context: ServerContext, given: str | list[int], *, add_special_tokens: bool, cache_salt: str | None
) -> Prompt:
    """A text or token ids as prompt; a long text is tokenized in a thread, so that running streams go on meanwhile."""
    if isinstance(given, str) and not add_special_tokens and len(given) <= _LONG_TEXT:
        return RenderedChat(given, cache_salt)
    salt: dict[str, str] = {} if cache_salt is None else {"cache_salt": cache_salt}
    if isinstance(given, str) and len(given) <= _LONG_TEXT:
        return cast("Prompt", {"prompt": given, **salt})
    if isinstance(given, str):
        given = await asyncio.to_thread(context.need_tokenizer().encode, given, add_special_tokens)
    return cast("Prompt", {"prompt_token_ids": given, **salt})


async def whole(outputs: Outputs) -> RequestOutput:
    """All outputs joined to one."""
    gathered = Gathered()
    async with aclosing(outputs) as parts:
        async for output in parts:
            gathered.add(output)
    return gathered.take()


async def all_whole(sources: Sequence[Outputs]) -> list[RequestOutput]:
    """Several jobs, each joined to one output, in their order. The first error ends all of them."""
    tasks = [asyncio.ensure_future(whole(source)) for source in sources]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def in_portions(outputs: Outputs, num_tokens: int) -> Outputs:
    """The same outputs, joined until so many tokens are new; the first and the last ones come at once."""
    return outputs if num_tokens == 1 else _gathered(outputs, num_tokens)


async def _gathered(outputs: Outputs, num_tokens: int) -> Outputs:
    gathered = Gathered()
    first = True
    async with aclosing(outputs) as parts:
        async for output in parts:
            gathered.add(output)
            if first or output.finished or gathered.num_tokens >= num_tokens:
                yield gathered.take()
                first = False


async def merged(sources: Sequence[Outputs]) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """Outputs of several jobs as they come, each with its job's place. The first error ends all of them."""
    if len(sources) == 1:
        async with aclosing(sources[0]) as outputs:
            async for output in outputs:
                yield 0, output
        return
    pending = {asyncio.ensure_future(anext(source)): place for place, source in enumerate(sources)}
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                place = pending.pop(task)
                try:
                    output = task.result()
                except StopAsyncIteration:
                    continue
                pending[asyncio.ensure_future(anext(sources[place]))] = place
                yield place, output
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        await asyncio.gather(*(source.aclose() for source in sources))


class Gathered:
    """Outputs that are joined until somebody takes them.

    Attributes:
        num_tokens: tokens that wait to be taken.
    """

    def __init__(self) -> None:
        self.num_tokens = 0
        self._parts: dict[int, _Part] = {}
        self._latest: RequestOutput | None = None
        self._prompt_logprobs: list[dict[int, Logprob] | None] | None = None

    def add(self, output: RequestOutput) -> None:
        self._latest = output
        if output.prompt_logprobs is not None:  # one output of a stream has them
            self._prompt_logprobs = output.prompt_logprobs
        for part in output.outputs:
            self.num_tokens += len(part.token_ids)
            self._parts.setdefault(part.index, _Part()).pieces.append(part)

    def take(self) -> RequestOutput:
        """What was added since the last call, at least one output."""
        assert self._latest is not None, "nothing was added"
        outputs = [part.joined() for _, part in sorted(self._parts.items())]
        taken = replace(self._latest, outputs=outputs, prompt_logprobs=self._prompt_logprobs)
        self._parts, self.num_tokens, self._prompt_logprobs = {}, 0, None
        return taken


class _Part:
    """The pieces of one answer."""

    def __init__(self) -> None:
        self.pieces: list[CompletionOutput] = []

    def joined(self) -> CompletionOutput:
        last = self.pieces[-1]
        if len(self.pieces) == 1:
            return last
        logprobs = None if last.logprobs is None else [entry for piece in self.pieces for entry in piece.logprobs or []]
        return replace(
            last,
            text="".join([piece.text for piece in self.pieces]),
            token_ids=[token_id for piece in self.pieces for token_id in piece.token_ids],
            logprobs=logprobs,
        )
