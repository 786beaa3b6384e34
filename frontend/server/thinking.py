"""A bound on thinking: thoughts that have used up their tokens are closed, and the answer goes on.

The request runs as ever until so many tokens are there. If the reasoning parser is still within the thoughts then, the
request is ended and a second one takes its place: the same prompt, the tokens so far, the closing tag. Its prompt is in
the prefix cache, so hardly anything is computed twice. The consumer sees one answer.

Where the cut lies is decided by tokens alone, and not by how they happened to be delivered: the same request gives the
same answer.
"""

from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import cast

import msgspec

from folovllm.frontend.outputs import CompletionOutput, RequestOutput
from folovllm.frontend.prompts import Prompt
from folovllm.frontend.server.answers import Job, Outputs, answer
from folovllm.frontend.server.chat_call import ChatCall
from folovllm.frontend.server.context import ServerContext
from folovllm.frontend.server.parsers.base import ReasoningParser


def chat_answer(context: ServerContext, call: ChatCall) -> Outputs:
    """The engine's outputs to a chat, its thoughts bounded where that was asked for."""
    budget = call.body.thinking_budget
    if budget is None:
        return answer(context, call.job)
    assert call.reasoning_format is not None and call.answer_context is not None, "`prepare_chat` asks for both"
    return _bounded(context, call, call.reasoning_format.make(call.answer_context), budget)


async def _bounded(context: ServerContext, call: ChatCall, parser: ReasoningParser, budget: int) -> Outputs:
    told: list[int] = []
    text = ""
    async with aclosing(answer(context, call.job)) as outputs:
        async for output in outputs:
            (part,) = output.outputs
            kept = list(part.token_ids[: budget - len(told)])
            if len(kept) == len(part.token_ids):
                told += kept
                text += part.text
                parser.push(part.text)
                yield output
                continue
            rest = _text_behind(context, call, text, [*told, *kept])
            parser.push(rest)
            if parser.in_reasoning:
                break
            yield output
            async for more in outputs:
                yield more
            return
        else:
            return
    closed = _closed(context, replace(part, text=rest + parser.close_text, token_ids=kept), parser.close_text)
    async for more in _going_on(context, call, replace(output, outputs=[closed]), told):
        yield more


def _text_behind(context: ServerContext, call: ChatCall, text: str, token_ids: Sequence[int]) -> str:
    """What the text of these tokens has behind `text`, without a character that is not whole."""
    whole = context.need_tokenizer().decode(token_ids, call.job.params.skip_special_tokens).rstrip("\ufffd")
    return whole.removeprefix(text) if whole.startswith(text) else ""


def _closed(context: ServerContext, part: CompletionOutput, close_text: str) -> CompletionOutput:
    """The last piece of the thoughts, with the tokens that close them."""
    close_ids = context.need_tokenizer().encode(close_text, add_special_tokens=False)
    return replace(part, token_ids=[*part.token_ids, *close_ids], finish_reason=None, stop_reason=None)


async def _going_on(context: ServerContext, call: ChatCall, closed: RequestOutput, told: Sequence[int]) -> Outputs:
    """The closed thoughts, and what a second request answers behind them."""
    (part,) = closed.outputs
    used = [*told, *part.token_ids]
    second = _second_job(call, [*closed.prompt_token_ids, *used], len(used))
    if second is None:
        yield replace(closed, outputs=[replace(part, finish_reason="length")], finished=True)
        return
    yield replace(closed, finished=False)
    async with aclosing(answer(context, second)) as outputs:
        async for output in outputs:
            yield _as_one(output, closed)


def _as_one(more: RequestOutput, first: RequestOutput) -> RequestOutput:
    """An output of the second request as one of the first, whose prompt is shorter."""
    return replace(more, prompt=first.prompt, prompt_token_ids=first.prompt_token_ids, num_cached_tokens=None)


def _second_job(call: ChatCall, token_ids: list[int], num_used: int) -> Job | None:
    """None where the answer has no token left."""
    params = call.job.params
    left = None if params.max_tokens is None else params.max_tokens - num_used
    if left is not None and left < 1:
        return None
    params = msgspec.structs.replace(params, max_tokens=left, min_tokens=max(0, params.min_tokens - num_used))
    salt = {} if call.body.cache_salt is None else {"cache_salt": call.body.cache_salt}
    return replace(call.job, prompt=cast("Prompt", {"prompt_token_ids": token_ids, **salt}), params=params)
