"""`POST /v1/completions`."""

import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response

from folovllm.common.errors import RequestError
from folovllm.frontend.outputs import CompletionOutput, RequestOutput
from folovllm.frontend.server.answers import Job, all_whole, answer, in_portions, merged, to_prompt
from folovllm.frontend.server.context import ServerContext, ignored_header, json_response, request_id_of
from folovllm.frontend.server.endpoint import Endpoint
from folovllm.frontend.server.logprobs import Entries, completion_logprobs, prompt_logprobs
from folovllm.frontend.server.protocol.common import Usage
from folovllm.frontend.server.protocol.completions import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
)
from folovllm.frontend.server.sampling import MAX_TOP_LOGPROBS, refuse_stream, to_sampling_params
from folovllm.frontend.server.spans import SpanOrigin, trace_headers
from folovllm.frontend.server.sse import DONE, EventStream, encode_event, error_event, unless_disconnected
from folovllm.frontend.server.usage import UsageCount

MAX_PROMPTS = 1024  # of one body; each is a request of its own in the engine's queue
_DEFAULT_MAX_TOKENS = 16  # OpenAI's


@dataclass(frozen=True, slots=True)
class _Call:
    """One HTTP request: its jobs, and what all its answers share."""

    body: CompletionRequest
    jobs: list[Job]
    prompts: list[str | list[int]]
    id: str
    model: str
    created: int

    def completion(self, choices: list[CompletionChoice], usage: Usage | None) -> Completion:
        return Completion(
            id=self.id,
            object="text_completion",
            created=self.created,
            model=self.model,
            choices=choices,
            usage=usage,
        )


class Completions:
    """Text completions."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context
        self._reader = context.reader(CompletionRequest)

    async def create(self, request: Request) -> Response:
        body = await self._reader.read(request)
        self._context.check_open()
        call = await self._prepare(body.value, request_id_of(request), trace_headers(request))
        outputs = [answer(self._context, job) for job in call.jobs]
        if not body.value.stream:
            results = await unless_disconnected(request, all_whole(outputs))
            return json_response(self._whole(call, results), ignored=body.ignored)
        portions = [in_portions(source, self._context.options.stream_interval) for source in outputs]
        return EventStream(
            self._events(call, merged(portions)),
            keep_alive_s=self._context.options.keep_alive_s,
            error_event=error_event,
            headers=ignored_header(body.ignored),
        )

    async def complete(self, data: bytes, request_id: str) -> Completion:
        """The whole answer to a body, without HTTP; its `stream` must be off. Raises ApiError and FoloVLLMError."""
        body = self._reader.decode(data).value
        refuse_stream(body)
        call = await self._prepare(body, request_id)
        return self._whole(call, await all_whole([answer(self._context, job) for job in call.jobs]))

    async def _prepare(self, body: CompletionRequest, http_id: str, trace: Mapping[str, str] | None = None) -> _Call:
        """Raises ApiError and RequestError, before anything is sent to the engine."""
        model = self._context.check_model(body.model)
        _check(body)
        of_prompt = {"prompt_logprobs": body.logprobs} if body.echo and body.prompt_logprobs is None else {}
        max_tokens = _DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        params = to_sampling_params(body, max_tokens=max_tokens, logprobs=body.logprobs, **of_prompt)
        prompts = _prompts(body.prompt)
        special, salt = body.add_special_tokens is not False, body.cache_salt
        name = body.request_id or http_id
        origin = SpanOrigin("text_completion", model, trace or {})
        jobs = []
        for i, given in enumerate(prompts):
            prompt = await to_prompt(self._context, given, add_special_tokens=special, cache_salt=salt)
            jobs.append(Job(prompt, params, name if len(prompts) == 1 else f"{name}-{i}", body.priority or 0, origin))
        return _Call(body, jobs, prompts, f"cmpl-{name}", model, int(time.time()))

    def _whole(self, call: _Call, results: list[RequestOutput]) -> Completion:
        writer, usage = _Writer(self._context, call), UsageCount()
        choices = []
        for place, result in enumerate(results):
            usage.add(result, place)
            choices += [writer.choice(place, result, part) for part in result.outputs]
        return call.completion(choices, usage.usage())

    async def _events(
        self, call: _Call, outputs: AsyncGenerator[tuple[int, RequestOutput], None]
    ) -> AsyncGenerator[bytes, None]:
        options = call.body.stream_options
        in_each = bool(options and options.continuous_usage_stats)
        writer, usage = _Writer(self._context, call), UsageCount()
        async with aclosing(outputs) as parts:
            async for place, output in parts:
                usage.add(output, place)
                choices = [writer.choice(place, output, part) for part in output.outputs]
                choices = [choice for choice in choices if choice.text or choice.finish_reason or choice.logprobs]
                if choices:  # else there are only tokens that have no text yet
                    yield encode_event(call.completion(choices, usage.usage() if in_each else None))
        if options and options.include_usage:
            yield encode_event(call.completion([], usage.usage()))
        yield DONE


class _Writer:
    """Outputs → choices; knows how much of each answer's text is written."""

    def __init__(self, context: ServerContext, call: _Call) -> None:
        self._context = context
        self._call = call
        self._lengths: dict[int, int] = {}

    def choice(self, place: int, output: RequestOutput, part: CompletionOutput) -> CompletionChoice:
        """One answer, or what is new of it; the first one begins with the prompt where that was asked for."""
        body = self._call.body
        index = place * (body.n or 1) + part.index
        first = index not in self._lengths
        prompt = self._prompt_text(place) if first and body.echo else ""
        written = self._lengths.get(index, 0)
        text = prompt + part.text
        self._lengths[index] = written + len(text)
        return CompletionChoice(
            index=index,
            text=text,
            logprobs=self._logprobs(output, part, bool(prompt), written),
            finish_reason=part.finish_reason,
            stop_reason=part.stop_reason,
            prompt_logprobs=prompt_logprobs(output.prompt_logprobs)
            if first and self._shows_prompt_logprobs()
            else None,
        )

    def _shows_prompt_logprobs(self) -> bool:
        return self._call.body.prompt_logprobs is not None

    def _prompt_text(self, place: int) -> str:
        prompt = self._call.prompts[place]
        if isinstance(prompt, str):
            return prompt
        return self._context.need_tokenizer().decode(prompt, skip_special_tokens=False)

    def _logprobs(
        self, output: RequestOutput, part: CompletionOutput, with_prompt: bool, offset: int
    ) -> CompletionLogprobs | None:
        num_top = self._call.body.logprobs
        if num_top is None:
            return None
        ids: list[int] = list(part.token_ids)
        entries: Entries = list(part.logprobs or [])
        if with_prompt:
            ids = output.prompt_token_ids + ids
            entries = [*(output.prompt_logprobs or [None] * len(output.prompt_token_ids)), *entries]
        if not ids:
            return None
        return completion_logprobs(self._context.need_tokenizer(), ids, entries, num_top, first_offset=offset)


def _check(body: CompletionRequest) -> None:
    if body.suffix:
        raise RequestError("suffix is not supported: models are not asked to fill gaps", "suffix")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise RequestError(f"best_of={body.best_of} must be the same as n, or left out", "best_of")
    if body.logprobs is not None and not 0 <= body.logprobs <= MAX_TOP_LOGPROBS:
        raise RequestError(f"logprobs={body.logprobs} must lie between 0 and {MAX_TOP_LOGPROBS}", "logprobs")


def _prompts(given: str | list[str | int | list[int]]) -> list[str | list[int]]:
    """The prompts of a body, each a text or token ids. Raises RequestError."""
    prompts: list[str | list[int]]
    if isinstance(given, str):
        prompts = [given]
    elif ids := [item for item in given if isinstance(item, int)]:
        if len(ids) < len(given):
            raise RequestError("prompt holds token ids beside texts or lists; give one kind", "prompt")
        prompts = [ids]
    else:
        prompts = [item for item in given if not isinstance(item, int)]
    if not prompts or not all(prompts):
        raise RequestError("prompt is empty: it needs at least one character, or one token", "prompt")
    if len(prompts) > MAX_PROMPTS:
        raise RequestError(f"prompt has {len(prompts)} prompts; at most {MAX_PROMPTS} are allowed", "prompt")
    return prompts


def endpoints(context: ServerContext) -> list[Endpoint]:
    """The endpoints of this module."""
    return [
        Endpoint(
            "POST",
            "/v1/completions",
            Completions(context).create,
            "Completes texts",
            body=CompletionRequest,
            answer=Completion,
            events=(Completion,),
        )
    ]
