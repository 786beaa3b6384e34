"""vLLM's CPU backend through its `LLM.generate`."""

import importlib
import os
import pathlib
import sys
import time
from typing import Any

from bench.peers.peer import Answer, Options


class VLLM:
    """An LLM of vLLM with its engine and worker processes, set up as its documentation advises for CPUs."""

    def __init__(self, options: Options) -> None:
        openmp = pathlib.Path(sys.prefix) / "lib" / "libiomp5.so"
        if openmp.exists():
            os.environ["LD_PRELOAD"] = str(openmp)  # its worker, a child, warns without it
        vllm: Any = importlib.import_module("vllm")
        self.version = f"vllm {vllm.__version__}"
        self._sampling_params: Any = vllm.SamplingParams
        self._llm: Any = vllm.LLM(
            options.model,
            dtype="bfloat16",
            max_model_len=options.max_model_len,
            max_num_seqs=options.max_num_seqs,
            skip_tokenizer_init=True,
            disable_log_stats=False,  # they hold the first token's time
        )

    def answer(self, prompts: list[list[int]], num_tokens: int) -> Answer:
        params = self._sampling_params(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        began = time.perf_counter()
        outputs = self._llm.generate(given, params, use_tqdm=False)
        seconds = time.perf_counter() - began
        return Answer(
            seconds,
            max(output.metrics.first_token_latency for output in outputs),
            [list(output.prompt_token_ids) for output in outputs],
            [list(output.outputs[0].token_ids) for output in outputs],
        )


def open_peer(options: Options) -> VLLM:
    return VLLM(options)
