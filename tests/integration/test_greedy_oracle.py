"""Greedy answers through all three processes equal transformers', however requests are run.

Alone, in one batch, preempted, with one step in flight or two: each way is held to the same oracle, in float32.
"""

import pathlib
from collections.abc import Sequence

import pytest

from folovllm import LLM, SamplingParams
from tests.fakes.model_folder import NUM_IDS, write_tokenizer
from tests.fakes.oracle import GreedyOracle, random_prompts, varied_prompts
from tests.fakes.tiny_models import FAMILIES, ROPES, make_model

NUM_TOKENS = 48
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)


def answers(llm: LLM, prompts: Sequence[list[int]]) -> list[list[int]]:
    outputs = llm.generate(list(prompts), GREEDY, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture(scope="module")
def demo_oracle(demo_model_dir: pathlib.Path) -> GreedyOracle:
    return GreedyOracle(demo_model_dir)


@pytest.mark.timeout(600)
def test_demo_model_alone_and_in_one_batch(demo_model_dir: pathlib.Path, demo_oracle: GreedyOracle) -> None:
    with LLM(str(demo_model_dir), dtype="float32", kv_cache_memory_gb=0.5) as llm:
        prompts = varied_prompts(llm.get_tokenizer())
        assert len(prompts) >= 30
        together = answers(llm, prompts)
        for prompt, answer in zip(prompts, together, strict=True):
            assert len(answer) == NUM_TOKENS
            demo_oracle.check(prompt, answer)
        for prompt in prompts:
            demo_oracle.check(prompt, answers(llm, [prompt])[0])


@pytest.mark.timeout(600)
def test_demo_model_preempted_and_with_one_step_in_flight(
    demo_model_dir: pathlib.Path, demo_oracle: GreedyOracle
) -> None:
    with LLM(str(demo_model_dir), dtype="float32", num_gpu_blocks_override=64, pipeline_depth=1) as llm:
        prompts = varied_prompts(llm.get_tokenizer())
        for prompt, answer in zip(prompts, answers(llm, prompts), strict=True):
            demo_oracle.check(prompt, answer)
        assert llm.get_stats().num_preemptions_total > 0


TINY = [("qwen3", rope) for rope in ROPES] + [(family, "default") for family in FAMILIES if family != "qwen3"]


@pytest.mark.parametrize(("family", "rope"), TINY)
def test_tiny_models_however_they_are_run(tmp_path: pathlib.Path, family: str, rope: str) -> None:
    folder = make_model(tmp_path / "model", family, rope=rope, vocab_size=NUM_IDS)
    write_tokenizer(folder)
    oracle = GreedyOracle(folder)
    prompts = random_prompts(NUM_IDS, [1, 2, 15, 16, 17, 31, 33, 64, 79])
    found = []
    for depth in (2, 1):
        with LLM(str(folder), dtype="float32", num_gpu_blocks_override=256, pipeline_depth=depth) as llm:
            found.append(answers(llm, prompts))
            found.append([answers(llm, [prompt])[0] for prompt in prompts])
    with LLM(
        str(folder), dtype="float32", num_gpu_blocks_override=14, max_num_batched_tokens=24, max_num_seqs=8
    ) as llm:
        found.append(answers(llm, prompts))
        assert llm.get_stats().num_preemptions_total > 0
    for way in found:
        for prompt, answer in zip(prompts, way, strict=True):
            assert len(answer) == NUM_TOKENS
            oracle.check(prompt, answer)
