"""Greedy answers held to transformers, and prompts of many kinds.

One forward pass over prompt and answer shows what transformers would have chosen at each position given the same tokens
before it. If that is the answer's own token everywhere, transformers' greedy answer is the same, token for token.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import torch
import transformers

TIE_GAP = 1e-3  # logits of float32 models computed in another order of sums differ by less than this

_SENTENCES = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "Explain why the sky is blue in one short paragraph.",
    "List three uses of a paper clip:",
    "Q: What is 17 + 25?\nA:",
    "Dear Sir or Madam,\n\nI am writing to",
    "In 1969, 3 astronauts flew 384,400 km to",
    "She said: “No — never!” and",
    "TO DO:\n- buy milk\n- ",
    "ALL CAPS SENTENCES ARE",
    "    leading blanks and\ttabs",
    "a",
    "你好，世界。今天天气",
    "请用一句话介绍北京：",
    "機械学習とは",
    "Привет, как дела?",
    "¿Cuál es la capital de España?",
    "مرحبا بالعالم",
    "def fibonacci(n):\n    ",
    "for (int i = 0; i < 10; i++) {\n",
    "SELECT name, age FROM users WHERE",
    '{"name": "Ada", "age": ',
    "<html>\n<body>\n<h1>",
    "import numpy as np\n\nx = np.",
    "🦜🔗 is a chain of",
    "😀😀😀",
    "e = mc²; ∑ xᵢ ≤ ∞ means",
    "http://example.com/?q=1&r=",
    "One two three four five six seven eight nine ten eleven",
    "The quick brown fox jumps over the lazy dog. " * 3,
]


def varied_prompts(tokenizer: Any) -> list[list[int]]:
    """32 prompts as token ids: languages, code, emoji, one token, 700 tokens."""
    prompts: list[list[int]] = [tokenizer.encode(sentence) for sentence in _SENTENCES]
    long = tokenizer.encode("It was the best of times, it was the worst of times, it was the age of wisdom. " * 60)
    return [*prompts, prompts[0][:1], long[:700]]


def random_prompts(vocab_size: int, lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """One prompt of random ids for each length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, vocab_size, (length,), generator=generator).tolist() for length in lengths]


class GreedyOracle:
    """transformers' model of `folder` in float32 on `device`, choosing among the first `num_ids` ids (None: all)."""

    def __init__(self, folder: pathlib.Path, device: str = "cpu", num_ids: int | None = None) -> None:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._model = loaded.eval().to(device)
        self._device = device
        self._num_ids = num_ids
        self._passed: set[tuple[tuple[int, ...], tuple[int, ...], float]] = set()  # a pass takes a quarter of a second

    @torch.inference_mode()
    def check(self, prompt: Sequence[int], answer: Sequence[int], tie_gap: float = TIE_GAP) -> None:
        """Raises AssertionError unless every token of `answer` is transformers' choice, or ties with it."""
        assert answer, "an empty answer shows nothing"
        case = tuple(prompt), tuple(answer), tie_gap
        if case in self._passed:
            return
        ids = torch.tensor([[*prompt, *answer]], device=self._device)
        logits = self._model(ids).logits[0, len(prompt) - 1 : -1, : self._num_ids].float().cpu()
        chosen = torch.tensor(answer)
        best, best_ids = logits.max(dim=-1)
        gaps = best - logits.gather(1, chosen[:, None])[:, 0]
        wrong = (chosen != best_ids) & (gaps > tie_gap)
        places = torch.nonzero(wrong).flatten().tolist()
        assert not places, (
            f"answer token {places[0]} is {answer[places[0]]}, transformers' is {int(best_ids[places[0]])} "
            f"by {float(gaps[places[0]]):.2e}; prompt of {len(prompt)} tokens: {list(prompt)[:20]}"
        )
        self._passed.add(case)
