"""Many requests from asyncio code, each of which could belong to another client.

python examples/async_many.py [MODEL]
"""

import asyncio
import sys

from folovllm import AsyncLLM, SamplingParams


async def answer(llm: AsyncLLM, prompt: str) -> str:
    params = SamplingParams(temperature=0, max_tokens=16)
    # Each request is its own stream; the engine computes all of them together.
    return "".join([output.outputs[0].text async for output in llm.generate(prompt, params)])


async def main() -> None:
    prompts = [f"{country} is a country in" for country in ("France", "Japan", "Kenya", "Peru")]
    async with AsyncLLM(sys.argv[1] if len(sys.argv) > 1 else "demo") as llm:
        for prompt, text in zip(prompts, await asyncio.gather(*(answer(llm, p) for p in prompts)), strict=True):
            print(f"{prompt} → {text!r}")


if __name__ == "__main__":
    asyncio.run(main())
