"""OpenVINO GenAI: its pipeline with continuous batching, which for one request is the default of `LLMPipeline` too."""

import importlib
import time
from typing import Any

from bench.peers.peer import Answer, Options


class OpenVINO:
    """A pipeline on the CPU; `options.form` is the folder that `optimum-cli export openvino` wrote."""

    def __init__(self, options: Options) -> None:
        self._openvino: Any = importlib.import_module("openvino")
        self._numpy: Any = importlib.import_module("numpy")
        genai: Any = importlib.import_module("openvino_genai")
        self.version = f"openvino-genai {genai.__version__}"
        self._generation_config: Any = genai.GenerationConfig
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = 2  # GB
        scheduler.max_num_seqs = options.max_num_seqs
        scheduler.max_num_batched_tokens = 2048
        scheduler.enable_prefix_caching = False
        properties = {"INFERENCE_NUM_THREADS": options.threads, "PERFORMANCE_HINT": "LATENCY"}
        self._pipeline: Any = genai.ContinuousBatchingPipeline(options.form, scheduler, "CPU", properties)

    def answer(self, prompts: list[list[int]], num_tokens: int) -> Answer:
        config = self._generation_config()
        config.max_new_tokens = num_tokens
        config.ignore_eos = True
        config.do_sample = False
        inputs = [self._openvino.Tensor(self._numpy.array([prompt], dtype="int64")) for prompt in prompts]
        began = time.perf_counter()
        results = self._pipeline.generate(inputs, [config] * len(prompts))
        seconds = time.perf_counter() - began
        firsts = [result.perf_metrics.get_ttft().mean / 1e3 for result in results]
        seen = [tensor.data[0].tolist() for tensor in inputs]
        return Answer(seconds, max(firsts), seen, [list(result.m_generation_ids[0]) for result in results])


def open_peer(options: Options) -> OpenVINO:
    return OpenVINO(options)
