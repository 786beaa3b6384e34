"""The same three processes with the worker on a CUDA device, held to transformers."""

import pathlib

import pytest

from folovllm import LLM, SamplingParams
from folovllm.frontend.engine_options import EngineOptions
from tests.fakes.model_folder import NUM_IDS, write_tokenizer
from tests.fakes.oracle import GreedyOracle, random_prompts
from tests.fakes.reference_shape import save_reference_shape
from tests.fakes.tiny_models import FAMILIES, make_model

pytestmark = pytest.mark.gpu

NUM_TOKENS = 32
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
LENGTHS = [1, 2, 15, 16, 17, 31, 33, 64, 90]


def answers(llm: LLM, prompts: list[list[int]], params: SamplingParams = GREEDY) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, params, use_tqdm=False)]


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_greedy_equals_transformers(tmp_path: pathlib.Path, family: str) -> None:
    folder = make_model(tmp_path / "model", family, vocab_size=NUM_IDS)
    write_tokenizer(folder)
    oracle = GreedyOracle(folder, "cuda")
    prompts = random_prompts(NUM_IDS, LENGTHS)
    ways: list[EngineOptions] = [{}, {"pipeline_depth": 1}, {"num_gpu_blocks_override": 14}]
    for options in ways:
        options |= {"dtype": "float32", "device": "cuda", "gpu_memory_utilization": 0.2}
        with LLM(folder, **options) as llm:
            for prompt, answer in zip(prompts, answers(llm, prompts), strict=True):
                oracle.check(prompt, answer)
            assert (llm.get_stats().num_preemptions_total > 0) == ("num_gpu_blocks_override" in options)


def test_seeded_samples_do_not_depend_on_the_batch(tmp_path: pathlib.Path) -> None:
    folder = make_model(tmp_path / "model", "qwen3", vocab_size=NUM_IDS)
    write_tokenizer(folder)
    prompts = random_prompts(NUM_IDS, LENGTHS)
    seeded = SamplingParams(temperature=1.0, seed=7, top_k=50, top_p=0.95, max_tokens=NUM_TOKENS, ignore_eos=True)
    with LLM(str(folder), dtype="float32", device="cuda", gpu_memory_utilization=0.2) as llm:
        together = answers(llm, prompts, seeded)
        assert [answers(llm, [prompt], seeded)[0] for prompt in prompts] == together


def test_bfloat16_of_the_reference_shape_agrees_up_to_ties(tmp_path: pathlib.Path) -> None:
    """Qwen3-0.6B's shape, random weights: a bf16 answer's tokens are within bf16 rounding of float32's best."""
    save_reference_shape(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    oracle = GreedyOracle(tmp_path / "model", "cuda", NUM_IDS)
    prompts = random_prompts(NUM_IDS, [1, 16, 100, 700])
    with LLM(str(tmp_path / "model"), device="cuda", gpu_memory_utilization=0.5, max_num_batched_tokens=512) as llm:
        for prompt, answer in zip(prompts, answers(llm, prompts), strict=True):
            oracle.check(prompt, answer, tie_gap=0.05)


def test_an_fp8_cache_answers_as_the_reference_on_a_cpu(tmp_path: pathlib.Path) -> None:
    """Scales and stored numbers follow from the weights alone; where sums are rounded otherwise, few tokens differ."""
    folder = make_model(tmp_path / "model", "qwen3", vocab_size=NUM_IDS)
    write_tokenizer(folder)
    prompts = random_prompts(NUM_IDS, LENGTHS)
    found = []
    ways: list[EngineOptions] = [{"device": "cpu"}, {"device": "cuda", "gpu_memory_utilization": 0.2}]
    for options in ways:
        options |= {"dtype": "float32", "kv_cache_dtype": "fp8"}
        with LLM(str(folder), **options) as llm:
            found.append(answers(llm, prompts))
    same = [one[0] == other[0] for one, other in zip(*found, strict=True)]
    assert sum(same) >= len(same) - 1
