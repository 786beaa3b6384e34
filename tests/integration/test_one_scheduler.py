"""However a prompt's tokens come into the cache, answers are the same, token for token in float32.

Whole or in chunks, computed or found, alone or beside others, undisturbed or preempted, with one step in flight or two.
"""

import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from folovllm import LLM, SamplingParams
from tests.fakes.model_folder import NUM_IDS, write_tokenizer
from tests.fakes.oracle import GreedyOracle, random_prompts
from tests.fakes.tiny_models import make_model

NUM_TOKENS = 16
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
SEEDED = SamplingParams(temperature=0.9, top_p=0.95, top_k=40, seed=7, n=2, max_tokens=NUM_TOKENS, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = make_model(tmp_path_factory.mktemp("model") / "qwen3", "qwen3", vocab_size=NUM_IDS)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    shared, *own = random_prompts(NUM_IDS, [48, 1, 15, 16, 17, 31, 33, 62])
    return [shared + each for each in own] + own


@pytest.fixture(scope="module")
def plain(folder: pathlib.Path, prompts: list[list[int]]) -> list[list[list[int]]]:
    """Answers of an engine that computes every prompt whole: [greedy, seeded]."""
    with LLM(str(folder), dtype="float32", num_gpu_blocks_override=512, enable_prefix_caching=False) as llm:
        return [answers(llm, prompts, GREEDY), answers(llm, prompts, SEEDED)]


@pytest.fixture
def engines(folder: pathlib.Path) -> Iterator[Any]:
    """Starts engines with the options given; all are closed at the end."""
    opened: list[LLM] = []

    def start(**options: Any) -> LLM:
        opened.append(LLM(str(folder), dtype="float32", **{"num_gpu_blocks_override": 512, **options}))
        return opened[-1]

    yield start
    for llm in opened:
        llm.close()


def answers(llm: LLM, prompts: Sequence[list[int]], params: SamplingParams) -> list[list[int]]:
    outputs = llm.generate(list(prompts), params, use_tqdm=False)
    return [list(completion.token_ids) for output in outputs for completion in output.outputs]


def test_the_plain_way_is_that_of_transformers(
    folder: pathlib.Path, prompts: list[list[int]], plain: list[list[list[int]]]
) -> None:
    oracle = GreedyOracle(folder)
    for prompt, answer in zip(prompts, plain[0], strict=True):
        oracle.check(prompt, answer)


@pytest.mark.parametrize("pipeline_depth", [1, 2])
def test_cold_and_cached(
    engines: Any, prompts: list[list[int]], plain: list[list[list[int]]], pipeline_depth: int
) -> None:
    llm = engines(pipeline_depth=pipeline_depth)
    for _ in range(2):
        assert [answers(llm, prompts, GREEDY), answers(llm, prompts, SEEDED)] == plain
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    found = [output.num_cached_tokens for output in outputs]
    assert found == [(len(prompt) - 1) // 16 * 16 for prompt in prompts]


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_batched_tokens": 16, "max_num_seqs": 16},
        {"max_num_batched_tokens": 37, "max_num_seqs": 16, "pipeline_depth": 1},
        {"max_num_batched_tokens": 64, "max_num_seqs": 16, "long_prefill_token_threshold": 11},
        {"max_num_batched_tokens": 40, "max_num_seqs": 16, "max_num_partial_prefills": 1, "target_itl_ms": 1.0},
    ],
    ids=["budget", "odd-budget-depth-1", "threshold", "target"],
)
@pytest.mark.parametrize("enable_prefix_caching", [False, True])
def test_whole_and_chunked(
    engines: Any,
    prompts: list[list[int]],
    plain: list[list[list[int]]],
    options: dict[str, Any],
    enable_prefix_caching: bool,
) -> None:
    llm = engines(enable_prefix_caching=enable_prefix_caching, **options)
    for _ in range(1 + enable_prefix_caching):
        assert [answers(llm, prompts, GREEDY), answers(llm, prompts, SEEDED)] == plain


def test_undisturbed_and_preempted_with_eviction(
    engines: Any, prompts: list[list[int]], plain: list[list[list[int]]]
) -> None:
    llm = engines(block_size=4, num_gpu_blocks_override=64, max_num_batched_tokens=48, max_num_seqs=12)
    for _ in range(3):
        assert [answers(llm, prompts, GREEDY), answers(llm, prompts, SEEDED)] == plain
    stats = llm.get_stats()
    assert stats.num_preemptions_total > 0
    assert stats.num_evicted_blocks_total > 0
    assert stats.num_cache_hits_total > 0


def test_a_conversation_hits_all_but_the_last_partial_block(engines: Any) -> None:
    cached, plain = engines(), engines(enable_prefix_caching=False)
    history, question = random_prompts(NUM_IDS, [21, 0])
    for turn in range(4):
        (mine,) = cached.generate([history], GREEDY, use_tqdm=False)
        (other,) = plain.generate([history], GREEDY, use_tqdm=False)
        answer = list(mine.outputs[0].token_ids)
        assert answer == list(other.outputs[0].token_ids)
        if turn:
            computed_before = len(history) - len(question) - 1  # K and V of an answer's last token are not computed
            assert mine.num_cached_tokens == computed_before // 16 * 16
        (question,) = random_prompts(NUM_IDS, [5 + turn])
        history = history + answer + question
