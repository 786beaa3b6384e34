"""Grammars through all three processes: the same tokens at every depth, in any company, after preemption."""

import json
import pathlib
import re
from typing import Any

import jsonschema
import pytest

from folovllm import LLM, RequestOutput, SamplingParams, StructuredOutputsParams
from tests.fakes.model_folder import ids_of
from tests.integration.conftest import is_idle

SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["ok", "n"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
GRAMMARS: list[dict[str, Any]] = [
    {"json": SCHEMA},
    {"regex": "[a-c]{3,9}(-[0-9]{2})?"},
    {"choice": ["yes", "no", "yes and no"]},
    {"grammar": 'start: "<" word ("," word)* ">"\nword: /[x-z]{1,3}/'},
]
PROMPTS = [ids_of(f"the cat sat {i}") for i in range(len(GRAMMARS))]


def held(index: int, **others: Any) -> SamplingParams:
    constraint = StructuredOutputsParams(**GRAMMARS[index])
    return SamplingParams(temperature=1.0, seed=index, max_tokens=40, structured_outputs=constraint, **others)


def tokens_of(output: RequestOutput) -> list[list[int]]:
    return [list(answer.token_ids) for answer in output.outputs]


def run(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> list[list[list[int]]]:
    return [tokens_of(output) for output in llm.generate(prompts, params, use_tqdm=False)]


@pytest.fixture(scope="module")
def alone(tiny_folder: pathlib.Path) -> dict[str, Any]:
    """Every request by itself, one step at a time: requests with a grammar, and free ones that are greedy."""
    free = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=30)
    with LLM(
        tiny_folder,
        load_format="dummy",
        dtype="float32",
        num_gpu_blocks_override=257,
        cpu_threads=1,
        pipeline_depth=1,
    ) as llm:
        with_grammar = [run(llm, [prompt], [held(i, n=2)])[0] for i, prompt in enumerate(PROMPTS)]
        without = [run(llm, [prompt], [free])[0] for prompt in PROMPTS]
        texts = [llm.generate([prompt], held(i), use_tqdm=False)[0].outputs[0] for i, prompt in enumerate(PROMPTS)]
        assert is_idle(llm)
    return {"held": with_grammar, "free": without, "free_params": free, "texts": texts}


def test_the_texts_fit(alone: dict[str, Any]) -> None:
    json_text, regex_text, choice, lark = (answer.text for answer in alone["texts"])
    assert [answer.finish_reason for answer in alone["texts"]] == ["stop"] * 4
    jsonschema.validate(json.loads(json_text), SCHEMA)
    assert re.fullmatch(GRAMMARS[1]["regex"], regex_text)
    assert choice in GRAMMARS[2]["choice"]
    assert re.fullmatch(r"<[x-z]{1,3}(,[x-z]{1,3})*>", lark)


@pytest.mark.parametrize(
    "options",
    [
        {"pipeline_depth": 1},
        {"pipeline_depth": 2},
        {"pipeline_depth": 2, "max_num_batched_tokens": 8, "max_num_seqs": 8},
        {"pipeline_depth": 2, "num_gpu_blocks_override": 11, "max_model_len": 64},
        {"pipeline_depth": 1, "num_gpu_blocks_override": 11, "max_model_len": 64, "enable_prefix_caching": False},
    ],
    ids=["depth 1", "depth 2", "chunks", "preempted", "preempted, no cache"],
)
def test_L09_together_with_free_ones_each_gets_what_it_gets_alone(
    options: dict[str, Any], alone: dict[str, Any], tiny_folder: pathlib.Path
) -> None:
    fields = {"load_format": "dummy", "dtype": "float32", "num_gpu_blocks_override": 257, "cpu_threads": 1, **options}
    with LLM(tiny_folder, **fields) as llm:
        params = [held(i, n=2) for i in range(len(PROMPTS))] + [alone["free_params"]] * len(PROMPTS)
        together = run(llm, PROMPTS + PROMPTS, params)
        preemptions = llm.get_stats().num_preemptions_total
        assert is_idle(llm)
    assert together == alone["held"] + alone["free"]
    assert (preemptions > 0) == ("max_model_len" in options)
