"""Prompts and options that the benchmarks share: the same seed gives the same prompts on every machine."""

import argparse
import random
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from folovllm import SamplingParams

LOWEST_ID = 100  # below it many tokenizers keep their special tokens
HIGHEST_ID = 40_000  # inside every vocabulary we know


class Lengths(NamedTuple):
    """Tokens of one request: of its prompt, and of its answer."""

    prompt: int
    output: int


def random_prompts(prompt_lens: Sequence[int], seed: int) -> list[list[int]]:
    """One prompt of random token ids for each length."""
    generator = random.Random(seed)
    return [[generator.randrange(LOWEST_ID, HIGHEST_ID) for _ in range(length)] for length in prompt_lens]


def mixed_lengths(num_requests: int, seed: int) -> list[Lengths]:
    """A mix like a chat service's: prompts of 16 to 1,024 tokens, answers of 16 to 256, short ones more often."""
    generator = random.Random(seed)
    return [Lengths(int(2 ** generator.uniform(4, 10)), int(2 ** generator.uniform(4, 8))) for _ in range(num_requests)]


def exactly(num_tokens: int) -> SamplingParams:
    """Greedy, and exactly this many tokens whatever the model says."""
    return SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)


def percentile(values: Sequence[float], percent: int) -> float:
    """The value that `percent` of 100 values do not exceed (linear between neighbours)."""
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def parser(description: str) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument("--model", default="demo", help="local folder, hub id, or demo")
    options.add_argument("--dtype", default="bfloat16", choices=["auto", "bfloat16", "float16", "float32"])
    options.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    options.add_argument("--seed", type=int, default=0, help="seed of the prompts")
    options.add_argument("--repeats", type=int, default=5, help="measurements of each figure; the median is reported")
    options.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, measures nothing")
    return options
