import torch
import torch.nn.functional as F

from folovllm.worker_proc.device import Placement
from folovllm.worker_proc.layers.linear import Linear
from folovllm.worker_proc.layers.norm import RMSNorm
from folovllm.worker_proc.layers.side_by_side import SideBySide


def test_layers_side_by_side_are_as_one() -> None:
    placement = Placement(torch.device("cpu"), torch.float32)
    layers = [Linear(6, {"gate": 4, "more": 1}, placement), Linear(6, {"up": 3}, placement, bias=True)]
    norm, both = RMSNorm(6, 1e-6, placement), SideBySide(layers)
    places = dict(both.checkpoint_tensors("mlp."))
    assert list(places) == ["mlp.gate.weight", "mlp.more.weight", "mlp.up.weight", "mlp.up.bias"]
    for place in (norm.weight, *places.values()):
        place.normal_()
    both.pack()
    assert both.num_bytes == 4 * 8 * 6
    hidden = torch.randn(3, 6)
    weight = torch.cat([places[f"mlp.{name}.weight"] for name in ("gate", "more", "up")])
    bias = torch.cat([torch.zeros(5), places["mlp.up.bias"]])
    product = F.rms_norm(hidden, (6,), norm.weight, 1e-6) @ weight.t() + bias
    torch.testing.assert_close(both.of_normed(hidden, norm), product)
    torch.testing.assert_close(both.gated(hidden, norm), F.silu(product[:, :4]) * product[:, 4:])
    total = torch.ones(3, 8)
    both.add_to(total, hidden)
    torch.testing.assert_close(total, 1 + hidden @ weight.t() + bias)
