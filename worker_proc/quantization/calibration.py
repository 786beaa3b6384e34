"""A network that quantizes itself while it runs over calibration text.

Each linear layer, called with the inputs of the whole text, collects what is to be known about them, rounds its weight
and answers with the product of the *rounded* weight: whatever comes after it sees, and makes up for, the errors made so
far ("true sequential"). One pass over the network is all it takes, and no layer needs to be known by its place in it.

The text goes through twice at once, as two batches: the first by the exact weights, the second by the rounded ones. So
a layer knows not only its inputs as they have become, X', but also what they should be, X, and its product is to be
that of X: see `quantizer`.
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
from folovllm.worker_proc.quantization.quantizer import Curvature
from folovllm.worker_proc.quantization.storage import Quantized

_ROWS = 4096  # so many inputs are copied to float32 at a time

Rounding = Callable[[str, Mapping[str, int], torch.Tensor, Callable[[], Curvature]], Quantized | None]
"""(prefix, parts, weight [N, K], what computes the curvature) → the rounded weight; None leaves it as it is."""


class CalibrationLinears:
    """The maker of layers that round themselves, by `rounding`, at their next call once it is set; see `round_over`."""

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
        if self._maker.rounding is None or self._rounded:
            return self._dense(x)
        self._rounded = True
        weight, (exact, rough) = self._dense.weight, x.chunk(2)
        output = self._dense(exact)
        rounded = self._maker.rounding(self._prefix, self._parts, weight, lambda: curvature_of(exact, rough))
        if rounded is not None:
            weight.copy_(rounded.dequantize())
        return torch.cat([output, self._dense(rough)])

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


def curvature_of(exact: torch.Tensor, rough: torch.Tensor) -> Curvature:
    """Of inputs [T, K] as they should be and as they are."""
    size = exact.shape[1]
    hessian, cross = (torch.zeros(size, size, device=exact.device) for _ in range(2))
    for should, are in zip(exact.split(_ROWS), rough.split(_ROWS), strict=True):
        rows = are.float()
        hessian.addmm_(rows.t(), rows)
        cross.addmm_(rows.t(), should.float())
    return Curvature(hessian, cross)


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


def round_over(
    model: CausalLM, linears: CalibrationLinears, sequences: torch.Tensor, rounding: Rounding
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds all layers of `model`, made by `linears`, on token ids [sequences, length].

    Returns:
        Hidden states [sequences · length, hidden_size] by the exact weights and by the rounded ones.
    """
    linears.rounding = rounding
    exact, rough = run_over(model, sequences.repeat(2, 1)).chunk(2)
    return exact, rough


def perplexity(model: CausalLM, sequences: torch.Tensor) -> float:
    """exp of the mean of -log p(token | tokens before it in its sequence), over token ids [sequences, length]."""
    total = 0.0
    for sequence in sequences:
        logits = model.compute_logits(run_over(model, sequence[None])[:-1]).float()
        total += float(F.cross_entropy(logits, sequence[1:], reduction="sum"))
    return float(torch.tensor(total / (sequences.shape[0] * (sequences.shape[1] - 1))).exp())
