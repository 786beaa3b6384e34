"""Measures an engine without a server: `folovllm bench latency` and `folovllm bench throughput`."""

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from folovllm.common.sampling_params import SamplingParams
from folovllm.frontend.benchmark.workload import Work
from folovllm.frontend.prompts import Prompt

if TYPE_CHECKING:
    from folovllm.frontend.llm import LLM
    from folovllm.frontend.outputs import RequestOutput

_LOWEST_ID = 100  # below it many tokenizers keep their special tokens


def random_ids(count: int, length: int, num_ids: int, seed: int) -> list[list[int]]:
    """Prompts of random token ids, below `num_ids`."""
    low = min(_LOWEST_ID, num_ids - 1)
    return np.random.default_rng(seed).integers(low, num_ids, (count, length)).tolist()  # type: ignore[no-any-return]


def measure_latency(
    llm: "LLM",
    sizes: tuple[int, int, int],
    *,
    n: int,
    num_warmups: int,
    num_iters: int,
    seed: int,
    on_end: Callable[[], None],
) -> list[float]:
    """Seconds of each of `num_iters` equal calls with one batch.

    Args:
        llm: the engine.
        sizes: requests in the batch, tokens of each prompt, tokens of each answer.
        n: answers to each prompt.
        num_warmups: calls before the first that counts.
        num_iters: calls that count.
        seed: of the prompts; each call has others, so that none is found in the prefix cache.
        on_end: called after every call.

    Raises:
        RequestError: the lengths do not fit the model.
    """
    batch, prompt_len, output_len = sizes
    params = SamplingParams(n=n, max_tokens=output_len, ignore_eos=True, temperature=1.0 if n > 1 else 0.0)
    seconds = []
    for i in range(num_warmups + num_iters):
        prompts: Sequence[Prompt] = random_ids(batch, prompt_len, llm.get_tokenizer().num_ids, seed + i)
        began = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        if i >= num_warmups:
            seconds.append(time.perf_counter() - began)
        on_end()
    return seconds


def latency_figures(seconds: Sequence[float], percentiles: Sequence[float]) -> dict[str, Any]:
    """Mean and percentiles in seconds; names as vLLM's results."""
    return {
        "avg_latency": float(np.mean(seconds)),
        "latencies": list(seconds),
        "percentiles": {f"{percent:g}": float(np.percentile(seconds, percent)) for percent in percentiles},
    }


def measure_throughput(llm: "LLM", works: Sequence[Work], *, n: int, show_progress: bool) -> dict[str, Any]:
    """Requests and tokens a second of one call with all works; names as vLLM's results.

    Raises:
        RequestError: a prompt does not fit the model.
    """
    prompts = [work.prompt for work in works]
    params = [
        SamplingParams(n=n, max_tokens=work.output_len, ignore_eos=True, temperature=1.0 if n > 1 else 0.0)
        for work in works
    ]
    began = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=show_progress)
    return throughput_figures(outputs, time.perf_counter() - began)


def throughput_figures(outputs: Sequence["RequestOutput"], seconds: float) -> dict[str, Any]:
    """Of the outputs of one call."""
    prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    output_tokens = sum(len(answer.token_ids) for output in outputs for answer in output.outputs)
    return {
        "elapsed_time": seconds,
        "num_requests": len(outputs),
        "total_num_tokens": prompt_tokens + output_tokens,
        "requests_per_second": len(outputs) / seconds,
        "tokens_per_second": (prompt_tokens + output_tokens) / seconds,
        "output_tokens_per_second": output_tokens / seconds,
    }
