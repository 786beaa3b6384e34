"""This engine through `LLM.generate`, as a user has it."""

import time

import folovllm
from bench.peers.peer import Answer, Options
from folovllm import LLM, SamplingParams


class Own:
    """An LLM with its core and worker processes."""

    version = folovllm.__version__

    def __init__(self, options: Options) -> None:
        assert options.max_num_seqs is not None
        self._llm = LLM(
            options.form,
            dtype="bfloat16",
            device="cpu",
            cpu_threads=options.threads,
            max_model_len=options.max_model_len,
            max_num_seqs=options.max_num_seqs,
        )

    def answer(self, prompts: list[list[int]], num_tokens: int) -> Answer:
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        began = time.perf_counter()
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - began
        firsts = [output.metrics.time_to_first_token for output in outputs if output.metrics is not None]
        return Answer(
            seconds,
            max(first for first in firsts if first is not None),
            [list(output.prompt_token_ids) for output in outputs],
            [list(output.outputs[0].token_ids) for output in outputs],
        )


def open_peer(options: Options) -> Own:
    return Own(options)
