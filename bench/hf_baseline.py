"""transformers' own `generate` on one padded batch: what the same machine does without an engine."""

import time
from typing import Any

from folovllm.frontend.model_hub import resolve


class HFBaseline:
    """A model in transformers, in this process."""

    def __init__(self, model: str, dtype: str, device: str) -> None:
        import torch
        import transformers

        self._torch = torch
        self._device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(resolve(model), dtype=dtype)
        self._model = loaded.to(self._device).eval()

    def generate(self, prompts: list[list[int]], num_tokens: int) -> tuple[float, list[list[int]]]:
        """Seconds for the batch and each answer's ids: greedy, exactly `num_tokens` tokens, left padding."""
        torch = self._torch
        longest = max(len(prompt) for prompt in prompts)
        rows = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        start = time.perf_counter()
        with torch.inference_mode():
            output = self._model.generate(
                torch.tensor(rows, device=self._device),
                attention_mask=torch.tensor(mask, device=self._device),
                min_new_tokens=num_tokens,
                max_new_tokens=num_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        answers: list[list[int]] = output[:, longest:].tolist()
        return time.perf_counter() - start, answers
