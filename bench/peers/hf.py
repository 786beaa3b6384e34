"""transformers: `generate` on one batch, left-padded. What it takes is imported by name: the interpreter is its own."""

import importlib
import time
from typing import Any

from bench.peers.peer import Answer, Options


class Transformers:
    """A model in bfloat16 with torch's scaled_dot_product_attention."""

    def __init__(self, options: Options) -> None:
        self._torch: Any = importlib.import_module("torch")
        transformers: Any = importlib.import_module("transformers")
        self._torch.set_num_threads(options.threads)
        self.version = f"transformers {transformers.__version__}, torch {self._torch.__version__}"
        loaded = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=self._torch.bfloat16)
        self._model: Any = loaded.eval()
        self._model.generation_config.eos_token_id = None  # else answers end with it

    def answer(self, prompts: list[list[int]], num_tokens: int) -> Answer:
        torch = self._torch
        longest = max(len(prompt) for prompt in prompts)
        rows = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        tokens_at: list[float] = []

        def note(_ids: Any, _scores: Any, **_: Any) -> Any:  # called after each step's tokens
            tokens_at.append(time.perf_counter())
            return torch.zeros(len(prompts), dtype=torch.bool)

        began = time.perf_counter()
        with torch.inference_mode():
            output = self._model.generate(
                torch.tensor(rows),
                attention_mask=torch.tensor(mask),
                min_new_tokens=num_tokens,
                max_new_tokens=num_tokens,
                do_sample=False,
                pad_token_id=0,
                stopping_criteria=[note],
            )
        seconds = time.perf_counter() - began
        ids: list[list[int]] = output.tolist()
        seen = [row[longest - len(prompt) : longest] for row, prompt in zip(ids, prompts, strict=True)]
        return Answer(seconds, tokens_at[0] - began, seen, [row[longest:] for row in ids])


def open_peer(options: Options) -> Transformers:
    return Transformers(options)
