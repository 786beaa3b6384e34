"""Sampling parameters spelled out one by one over transformers' logits: slow, and nothing to misunderstand.

Checks answers as `oracle` does: given the answer's tokens so far, the next one must be the best one, or tie with it.
"""

import collections
import math
import pathlib
from collections.abc import Sequence

import torch

from folovllm.common.sampling_params import SamplingParams
from tests.fakes.tiny_models import load_reference

TIE_GAP = 1e-3


class PlainSampling:
    """transformers' model of `folder` in float32, and what parameters do to its logits."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._model = load_reference(folder)

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """[len(token_ids), V]; row i predicts token i + 1."""
        output: torch.Tensor = self._model(torch.tensor([list(token_ids)])).logits[0]
        return output.float()

    def logprobs(self, token_ids: Sequence[int]) -> torch.Tensor:
        return self.logits(token_ids).log_softmax(dim=-1)

    def check_greedy(
        self,
        prompt: Sequence[int],
        answer: Sequence[int],
        params: SamplingParams,
        stop_ids: Sequence[int] = (),
        bad_words: Sequence[Sequence[int]] = (),
    ) -> None:
        """Raises AssertionError unless every token of `answer` is the best under the parameters, or ties with it.

        Args:
            prompt: token ids.
            answer: token ids.
            params: greedy ones.
            stop_ids: the stop set, which min_tokens forbids.
            bad_words: token sequences.
        """
        assert answer, "an empty answer shows nothing"
        rows = self.logits([*prompt, *answer])[len(prompt) - 1 : -1]
        for place, (row, token) in enumerate(zip(rows, answer, strict=True)):
            adjusted = _adjusted(row.clone(), prompt, answer[:place], params)
            if place < params.min_tokens:
                adjusted[list(stop_ids)] = -math.inf
            for word in bad_words:
                if list(answer[:place])[place - len(word) + 1 :] == list(word[:-1]):
                    adjusted[word[-1]] = -math.inf
            gap = float(adjusted.max() - adjusted[token])
            assert gap <= TIE_GAP, f"answer token {place} is {token}; {int(adjusted.argmax())} is better by {gap:.2e}"


def _adjusted(row: torch.Tensor, prompt: Sequence[int], answer: Sequence[int], params: SamplingParams) -> torch.Tensor:
    for token, bias in (params.logit_bias or {}).items():
        row[token] += bias
    for token in set(prompt) | set(answer):
        penalty = params.repetition_penalty or 1.0
        row[token] = row[token] / penalty if row[token] > 0 else row[token] * penalty
    for token, count in collections.Counter(answer).items():
        row[token] -= params.presence_penalty + count * params.frequency_penalty
    if params.allowed_token_ids is not None:
        kept = row[params.allowed_token_ids]
        row[:] = -math.inf
        row[params.allowed_token_ids] = kept
    return row
