"""A network that quantizes itself while it runs over calibration text.

Each linear layer, called with the inputs of the whole text, collects its Hessian, rounds its weight and answers with
the product of the *rounded* weight: whatever comes after it sees, and makes up for, the errors made so far ("true
sequential"). One pass over the network is all it takes, and no layer needs to be known by its place in it.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F

from folovllm.worker_proc.device import Placement
from folovllm.worker_proc.layers.activation import silu_and_mul
from folovllm.worker_proc.layers.blocked import BlockedWeight
from folovllm.worker_proc.layers.linear import Linear, LinearLayer
from folovllm.worker_proc.layers.norm import RMSNorm
from folovllm.worker_proc.models.registry import CausalLM
from folovllm.worker_proc.quantization.quantizer import Hessian
from folovllm.worker_proc.quantization.storage import Quantized

_ROWS = 4096  # a Hessian takes that many inputs at a time: they are copied to float32

Rounding = Callable[[str, Mapping[str, int], torch.Tensor, Callable[[], torch.Tensor]], Quantized | None]
"""(prefix, parts, weight [N, K], what computes the Hessian [K, K]) → the rounded weight; None leaves it as it is."""


class CalibrationLinears:
    """The maker of layers that round themselves, by `rounding`, at their next call once it is set."""

    def __init__(self, placement: Placement) -> None:
        self._placement = placement
        self.rounding: Rounding | None = None
        self.num_layers = 0

    def __call__(
        self, prefix: str, in_features: int, parts: Mapping[str, int], /, *, bias: bool = False
    ) -> LinearLayer:
        self.num_layers += 1
        return _CalibrationLinear(prefix, parts, Linear(in_features, parts, self._placement, bias=bias), self)


class _CalibrationLinear:
    def __init__(self, prefix: str, parts: Mapping[str, int], dense: Linear, maker: CalibrationLinears) -> None:
        self._prefix, self._parts, self._dense, self._maker = prefix, parts, dense, maker
        self._rounded = False
        self.blocked: BlockedWeight | None = None
        self.bias = dense.bias

    @property
    def num_bytes(self) -> int:
        return self._dense.num_bytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._maker.rounding is not None and not self._rounded:
            self._rounded = True
            weight = self._dense.weight
            rounded = self._maker.rounding(self._prefix, self._parts, weight, lambda: hessian_of(x))
            if rounded is not None:
                weight.copy_(rounded.dequantize())
        return self._dense(x)

    def of_normed(self, hidden: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        return self(norm(hidden))

    def gated(self, hidden: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        return silu_and_mul(self(norm(hidden)))

    def add_to(self, hidden: torch.Tensor, x: torch.Tensor) -> None:
        hidden.add_(self(x))

    def checkpoint_tensors(self, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        return self._dense.checkpoint_tensors(prefix)

    def pack(self) -> None:
        """The weight stays as it is: it will be rounded in place."""


def hessian_of(x: torch.Tensor) -> torch.Tensor:
    """Xᵀ · X of inputs [T, K]: float32 [K, K]."""
    hessian = Hessian(x.shape[1], x.device)
    for rows in x.split(_ROWS):
        hessian.add(rows)
    return hessian.sum


class WholeSequences:
    """Attention of sequences of one length, from their first token to their last, without a cache."""

    def __init__(self, length: int) -> None:
        self._length = length

    def attend(self, _layer: int, query: torch.Tensor, key_and_value: torch.Tensor) -> torch.Tensor:
        """See `attention.backend.AttentionStep`."""
        query = query.unflatten(0, (-1, self._length)).transpose(1, 2)  # [sequences, heads, length, D]
        key, value = key_and_value.unflatten(0, (-1, self._length)).transpose(1, 2).chunk(2, dim=1)
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return output.transpose(1, 2).flatten(0, 1).flatten(1)


def run_over(model: CausalLM, sequences: torch.Tensor) -> torch.Tensor:
    """Token ids [sequences, length] → hidden states [sequences · length, hidden_size]."""
    count, length = sequences.shape
    positions = torch.arange(length, device=sequences.device).repeat(count)
    return model.forward(sequences.flatten(), positions, WholeSequences(length))


def perplexity(model: CausalLM, sequences: torch.Tensor) -> float:
    """exp of the mean of -log p(token | tokens before it in its sequence), over token ids [sequences, length]."""
    total = 0.0
    for sequence in sequences:
        logits = model.compute_logits(run_over(model, sequence[None])[:-1]).float()
        total += float(F.cross_entropy(logits, sequence[1:], reduction="sum"))
    return float(torch.tensor(total / (sequences.shape[0] * (sequences.shape[1] - 1))).exp())
