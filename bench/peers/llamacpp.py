"""llama.cpp through the C interface of llama-cpp-python: all requests in one batch, as its own server does.

llama-cpp-python's `Llama.generate` takes one request; for one request both do the same.
"""

import importlib
import time
from typing import Any

from bench.peers.peer import Answer, Options

_BATCH = 2048  # llama.cpp's defaults
_MICRO_BATCH = 512

Entry = tuple[int, int, int, bool]  # token, position, request, whether it is its prompt's last


def prompt_batches(prompts: list[list[int]], size: int) -> list[list[Entry]]:
    """All prompts' tokens, one prompt after another, in pieces of at most `size`."""
    entries = [
        (token, position, request, position == len(prompt) - 1)
        for request, prompt in enumerate(prompts)
        for position, token in enumerate(prompt)
    ]
    return [entries[start : start + size] for start in range(0, len(entries), size)]


class LlamaCpp:
    """A model from a GGUF file. Contexts are made for each number and length of requests, outside of what is timed."""

    def __init__(self, options: Options) -> None:
        self._lib: Any = importlib.import_module("llama_cpp")
        self.version = f"llama-cpp-python {self._lib.__version__}"
        self._threads = options.threads
        self._silence: Any = self._lib.llama_log_callback(lambda _level, _text, _data: None)  # else a line a tensor
        self._lib.llama_log_set(self._silence, None)
        self._lib.llama_backend_init()
        params = self._lib.llama_model_default_params()
        self._model: Any = self._lib.llama_model_load_from_file(options.form.encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {options.form}")
        self._greedy: Any = self._lib.llama_sampler_init_greedy()
        self._batch: Any = self._lib.llama_batch_init(_BATCH, 0, 1)
        self._contexts: dict[tuple[int, int], Any] = {}

    def _context(self, num_requests: int, length: int) -> Any:
        room = -(-length // 256) * 256
        if (num_requests, room) not in self._contexts:
            params = self._lib.llama_context_default_params()
            params.n_ctx, params.n_seq_max = num_requests * room, num_requests
            params.n_batch, params.n_ubatch = _BATCH, _MICRO_BATCH
            params.n_threads = params.n_threads_batch = self._threads
            context = self._lib.llama_init_from_model(self._model, params)
            if not context:
                raise RuntimeError(f"llama.cpp makes no context for {num_requests} requests of {room} tokens")
            self._contexts[num_requests, room] = context
        return self._contexts[num_requests, room]

    def answer(self, prompts: list[list[int]], num_tokens: int) -> Answer:
        context = self._context(len(prompts), max(map(len, prompts)) + num_tokens)
        self._lib.llama_memory_clear(self._lib.llama_get_memory(context), True)
        answers: list[list[int]] = [[] for _ in prompts]
        began = time.perf_counter()
        for entries in prompt_batches(prompts, _BATCH):
            self._step(context, entries, answers)
        first_s = time.perf_counter() - began
        for count in range(1, num_tokens):
            entries = [(answer[-1], len(prompts[i]) + count - 1, i, True) for i, answer in enumerate(answers)]
            self._step(context, entries, answers)
        return Answer(time.perf_counter() - began, first_s, prompts, answers)

    def _step(self, context: Any, entries: list[Entry], answers: list[list[int]]) -> None:
        """Computes a batch and puts a token to the answer of each request whose last known token was in it."""
        batch = self._batch
        batch.n_tokens = len(entries)
        for i, (token, position, request, is_last) in enumerate(entries):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = request
            batch.logits[i] = is_last
        code = self._lib.llama_decode(context, batch)
        if code != 0:
            raise RuntimeError(f"llama_decode gives {code}")
        for i, (_, _, request, is_last) in enumerate(entries):
            if is_last:
                answers[request].append(self._lib.llama_sampler_sample(self._greedy, context, i))


def open_peer(options: Options) -> LlamaCpp:
    return LlamaCpp(options)
