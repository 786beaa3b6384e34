import math
import pathlib
from collections.abc import Callable, Mapping

import pytest
import torch

from folovllm.common.model_config import read_model_config
from folovllm.worker_proc.device import Placement
from folovllm.worker_proc.models.registry import CausalLM, build_model
from folovllm.worker_proc.quantization.calibration import (
    CalibrationLinears,
    curvature_of,
    perplexity,
    round_over,
    run_over,
)
from folovllm.worker_proc.quantization.config import Scheme
from folovllm.worker_proc.quantization.quantizer import Curvature, round_to_nearest
from folovllm.worker_proc.quantization.storage import Quantized
from folovllm.worker_proc.weights import load_weights
from tests.fakes.tiny_models import FAMILIES, load_reference, make_model

FLOAT32 = Placement(torch.device("cpu"), torch.float32)
SEQUENCES = torch.randint(0, 199, (3, 12), generator=torch.Generator().manual_seed(0))


def load(folder: pathlib.Path) -> tuple[CausalLM, CalibrationLinears]:
    linears = CalibrationLinears(FLOAT32)
    model = build_model(read_model_config(folder), FLOAT32, 64, linears)
    load_weights(model, folder)
    return model, linears


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_until_it_rounds_it_is_the_network(tmp_path: pathlib.Path, family: str) -> None:
    make_model(tmp_path, family)
    model, _ = load(tmp_path)
    logits = model.compute_logits(run_over(model, SEQUENCES)).view(3, 12, -1)
    expected = load_reference(tmp_path)(SEQUENCES)
    torch.testing.assert_close(logits, expected.logits, atol=1e-4, rtol=1e-4)
    loss = load_reference(tmp_path)(SEQUENCES, labels=SEQUENCES).loss
    assert math.isclose(perplexity(model, SEQUENCES), math.exp(float(loss)), rel_tol=1e-4)


@torch.inference_mode()
def test_each_layer_sees_what_the_rounded_ones_before_it_give(tmp_path: pathlib.Path) -> None:
    make_model(tmp_path, "llama")
    model, linears = load(tmp_path)
    exact = run_over(model, SEQUENCES)
    seen: list[str] = []
    drifts: list[float] = []

    def rounding(
        prefix: str, parts: Mapping[str, int], weight: torch.Tensor, curvature: Callable[[], Curvature]
    ) -> Quantized | None:
        seen.append(f"{prefix}{'+'.join(parts)}")
        found = curvature()
        assert weight.shape == (sum(parts.values()), len(found.hessian))
        drifts.append(float((found.cross - found.hessian).norm() / found.hessian.norm()))
        return round_to_nearest(weight, Scheme(4, 16, sym=False))

    untouched, first = round_over(model, linears, SEQUENCES, rounding)
    second = run_over(model, SEQUENCES)
    layer = ["self_attn.q_proj+k_proj+v_proj", "self_attn.o_proj", "mlp.gate_proj+up_proj", "mlp.down_proj"]
    assert seen == [f"model.layers.{index}.{name}" for index in range(2) for name in layer]  # once each, in order
    assert linears.num_layers == len(seen) + 1  # and the head
    torch.testing.assert_close(untouched, exact)
    assert drifts[0] == 0 and all(1e-4 < drift < 0.5 for drift in drifts[1:])
    torch.testing.assert_close(first, second)  # the pass that rounds is one over the rounded network
    assert 1e-3 < (first - exact).norm() / exact.norm() < 0.5


def test_the_curvature_of_many_rows() -> None:
    exact, rough = torch.randn(2, 5000, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = curvature_of(exact, rough)
    torch.testing.assert_close(found.hessian, rough.float().t() @ rough.float(), atol=1e-2, rtol=1e-4)
    torch.testing.assert_close(found.cross, rough.float().t() @ exact.float(), atol=1e-2, rtol=1e-4)
