"""What the tests of sampling parameters share."""

from collections.abc import Sequence
from typing import Any

from folovllm import LLM, RequestOutput, SamplingParams
from tests.fakes.model_folder import ids_of

GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "max_tokens": 24}
RANDOM: dict[str, Any] = {"temperature": 1.0, "ignore_eos": True, "max_tokens": 24, "seed": 5}
PROMPT = ids_of("the cat sat")


def run(llm: LLM, prompts: Any, params: SamplingParams | Sequence[SamplingParams]) -> list[RequestOutput]:
    return llm.generate(prompts, params, use_tqdm=False)


def ids(llm: LLM, prompt: Any = PROMPT, **params: Any) -> list[int]:
    (output,) = run(llm, prompt, SamplingParams(**params))
    return list(output.outputs[0].token_ids)
