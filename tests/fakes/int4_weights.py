"""Random 4-bit weights, plain."""

import torch

from folovllm.worker_proc.quantization.storage import Quantized


def random_weight(outputs: int, inputs: int, group_size: int, *, sym: bool, shuffled: bool = False) -> Quantized:
    """A weight [outputs, inputs]; group size -1: one group; shuffled: inputs are dealt out to groups in any order."""
    generator = torch.Generator().manual_seed(outputs + inputs + group_size)
    groups = torch.arange(inputs) // (inputs if group_size == -1 else group_size)
    count = int(groups.max()) + 1
    zeros = torch.randint(0, 16, (count, outputs), generator=generator, dtype=torch.uint8)
    return Quantized(
        torch.randint(0, 16, (inputs, outputs), generator=generator, dtype=torch.uint8),
        torch.full_like(zeros, 8) if sym else zeros,
        torch.randn(count, outputs, generator=generator).mul_(0.01).half(),
        groups[torch.randperm(inputs, generator=generator)] if shuffled else groups,
    )


def to_device(weight: Quantized, device: torch.device) -> Quantized:
    """The same there."""
    tensors = (weight.numbers, weight.zeros, weight.scales, weight.groups)
    return Quantized(*(tensor.to(device) for tensor in tensors))


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Of a whole tensor, against one of float64."""
    return float((actual.cpu().double() - expected).norm() / expected.norm())
