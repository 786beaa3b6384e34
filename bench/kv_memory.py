"""KV memory: contiguous reservation (arithmetic) against paged blocks (the engine's KVCacheManager and statistics)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.workload import Lengths, exactly, random_prompts
from folovllm import LLM
from folovllm.common.model_config import read_model_config
from folovllm.core_proc.block_pool import BlockPool
from folovllm.core_proc.kv_cache_manager import KVCacheManager


def kv_bytes_per_token(folder: Path, bytes_per_number: int) -> int:
    """K and V of one token in all layers."""
    config = read_model_config(folder)
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * bytes_per_number


@dataclass(frozen=True)
class Reading:
    """The engine's KV cache at one moment.

    Attributes:
        step: steps submitted until then.
        num_running: requests that hold blocks.
        tokens_used: tokens whose K and V are held.
        tokens_reserved: tokens that the blocks in use have room for.
    """

    step: int
    num_running: int
    tokens_used: int
    tokens_reserved: int


def watch_engine(llm: LLM, lengths: Sequence[Lengths], *, block_size: int, seed: int, every: int) -> list[Reading]:
    """Runs all requests at once as streams; reads the engine's statistics each time `every` more tokens have come."""
    prompts = random_prompts([length.prompt for length in lengths], seed)
    streams = [llm.stream(prompt, exactly(length.output)) for prompt, length in zip(prompts, lengths, strict=True)]
    readings = []
    num_tokens = 0
    while streams:
        unfinished = []
        for stream in streams:
            output = next(stream, None)
            if output is None:
                continue
            unfinished.append(stream)
            before, num_tokens = num_tokens, num_tokens + sum(len(answer.token_ids) for answer in output.outputs)
            if before // every != num_tokens // every:
                stats = llm.get_stats()
                used_blocks = stats.num_blocks - stats.num_free_blocks
                readings.append(
                    Reading(stats.num_steps_total, stats.num_running, stats.tokens_in_use, used_blocks * block_size)
                )
        streams = unfinished
    return readings


def fit_contiguous(budget_tokens: int, reserved_per_request: int) -> int:
    """Requests that fit if each reserves the same length in one piece."""
    return budget_tokens // reserved_per_request


def fit_paged(budget_tokens: int, block_size: int, lengths: Sequence[Lengths]) -> int:
    """Requests at their full length that fit into the same memory in blocks, taken from `lengths` again and again."""
    manager = KVCacheManager(BlockPool(1 + budget_tokens // block_size), block_size)
    count = 0
    while manager.allocate(count, sum(lengths[count % len(lengths)])) is not None:
        count += 1
    return count
