"""Joining outputs: whole, in portions, of several jobs at once."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace

import pytest

from folovllm.common.errors import RequestFailedError
from folovllm.frontend.outputs import CompletionOutput, Logprob, RequestOutput
from folovllm.frontend.server.answers import all_whole, in_portions, merged, whole


def output(text: str, index: int = 0, *, finished: bool = False) -> RequestOutput:
    part = CompletionOutput(
        index,
        text,
        [ord(c) for c in text],
        logprobs=[{ord(c): Logprob(-1.0)} for c in text],
        finish_reason="stop" if finished else None,
    )
    return RequestOutput("r", "p", [1, 2], outputs=[part], finished=finished)


class Source:
    """A generator that tells whether it was closed."""

    def __init__(self, outputs: Sequence[RequestOutput | Exception], *, hangs: bool = False) -> None:
        self.closed = False
        self._outputs = outputs
        self._hangs = hangs

    async def generate(self) -> AsyncGenerator[RequestOutput, None]:
        try:
            for item in self._outputs:
                if isinstance(item, Exception):
                    raise item
                yield item
            if self._hangs:
                await asyncio.Event().wait()
        finally:
            self.closed = True


def test_whole() -> None:
    source = Source([output("ab"), output("x", 1), output("c", finished=True)])
    result = asyncio.run(whole(source.generate()))
    assert [(part.index, part.text, part.token_ids) for part in result.outputs] == [
        (0, "abc", [97, 98, 99]),
        (1, "x", [120]),
    ]
    assert [len(part.logprobs or []) for part in result.outputs] == [3, 1]
    assert result.outputs[0].finish_reason == "stop"
    assert result.finished
    assert source.closed


def test_log_probabilities_of_the_prompt_are_kept_whichever_output_has_them() -> None:
    first = replace(output("a"), prompt_logprobs=[None, {2: Logprob(-1.0)}])
    result = asyncio.run(whole(Source([first, output("b", finished=True)]).generate()))
    assert result.prompt_logprobs == [None, {2: Logprob(-1.0)}]


@pytest.mark.parametrize(
    "num_tokens, texts",
    [(1, ["a", "b", "cd", "e", "f"]), (2, ["a", "bcd", "ef"]), (3, ["a", "bcd", "ef"]), (100, ["a", "bcdef"])],
)
def test_portions(num_tokens: int, texts: list[str]) -> None:
    async def collect() -> list[str]:
        outputs = [output(text) for text in ("a", "b", "cd", "e")] + [output("f", finished=True)]
        return [joined.outputs[0].text async for joined in in_portions(Source(outputs).generate(), num_tokens)]

    assert asyncio.run(collect()) == texts


def test_merged_keeps_each_order_and_closes_all() -> None:
    sources = [Source([output(c) for c in text]) for text in ("abc", "x", "")]

    async def collect() -> dict[int, str]:
        texts = dict.fromkeys(range(3), "")
        async for place, part in merged([source.generate() for source in sources]):
            texts[place] += part.outputs[0].text
        return texts

    assert asyncio.run(collect()) == {0: "abc", 1: "x", 2: ""}
    assert all(source.closed for source in sources)


@pytest.mark.parametrize("together", ["merged", "all_whole"])
def test_the_first_error_ends_all(together: str) -> None:
    sources = [Source([output("a")], hangs=True), Source([output("b"), RequestFailedError("no")])]

    async def collect() -> None:
        generators = [source.generate() for source in sources]
        if together == "merged":
            assert [place async for place, _ in merged(generators)] == []
        else:
            await all_whole(generators)

    with pytest.raises(RequestFailedError):
        asyncio.run(collect())
    assert all(source.closed for source in sources)


@pytest.mark.parametrize("count", [1, 2])
def test_a_consumer_that_leaves_closes_all(count: int) -> None:
    sources = [Source([output("a")], hangs=True) for _ in range(count)]

    async def collect() -> None:
        generator = merged([source.generate() for source in sources])
        await anext(generator)
        await generator.aclose()

    asyncio.run(collect())
    assert all(source.closed for source in sources)
