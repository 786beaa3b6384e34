"""Grammar: only the tokens of a row's mask, which the core has filled, may be sampled."""

import math

import numpy as np
import numpy.typing as npt
import torch

from folovllm.worker_proc.host_to_device import upload
from folovllm.worker_proc.sample.constraints import Precedence

_WORD_BITS = 32


class TokenMask:
    """Forbids what is not in the mask. The masks go to the device as they are, a bit for each token."""

    precedence = Precedence.GRAMMAR

    def __init__(self, rows: npt.NDArray[np.int64], masks: npt.NDArray[np.uint32], device: torch.device) -> None:
        """`rows` [m] of the step's logits; `masks` [m, words]: bit i of word w allows token 32 · w + i."""
        self._rows = upload(rows, device)
        self._words = upload(masks.view(np.int32), device)

    def apply(self, logits: torch.Tensor) -> None:
        bits = torch.arange(_WORD_BITS, dtype=torch.int32, device=logits.device)
        allowed = self._words[:, :, None].bitwise_right_shift(bits).bitwise_and_(1).view(len(self._rows), -1)
        forbidden = allowed[:, : logits.shape[1]] == 0
        logits[self._rows] = logits[self._rows].masked_fill_(forbidden, -math.inf)
