import pytest
import torch

from folovllm.worker_proc.layers.int4_words import pack_words
from tests.fakes.int4_weights import random_weight, relative_error, to_device
from tests.fakes.triton_device import half_types


@pytest.mark.parametrize(
    ("inputs", "group_size", "sym", "shuffled"),
    [(64, 16, True, False), (96, 64, False, True), (1024, 128, False, False), (2048, -1, True, False)],
)
def test_rows_of_the_weight(device: torch.device, inputs: int, group_size: int, sym: bool, shuffled: bool) -> None:
    from folovllm.worker_proc.kernels.triton.int4_expand import expand

    weight = random_weight(40, inputs, group_size, sym=sym, shuffled=shuffled)
    words, plain = pack_words(to_device(weight, device)), weight.dequantize(torch.float64)
    assert words is not None
    if words.order is not None:
        plain = plain[:, words.order.cpu()]
    for dtype in half_types(device):
        for first, count in ((0, 40), (24, 13)):
            out = torch.full((count + 1, inputs), torch.nan, dtype=dtype, device=device)
            expand(words, first, out[:count])
            assert relative_error(out[:count], plain[first : first + count]) < 3e-3
            assert bool(out[count].isnan().all())
