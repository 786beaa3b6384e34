import pytest
import torch

from folovllm.common.errors import ModelError
from folovllm.worker_proc.quantization.config import Scheme
from folovllm.worker_proc.quantization.quantizer import Curvature, Recipe, _Columns, quantize, round_to_nearest
from folovllm.worker_proc.quantization.storage import Quantized

SCHEMES = [Scheme(4, 32, sym=True), Scheme(4, 16, sym=False), Scheme(4, -1, sym=True), Scheme(8, 64, sym=False)]


def layer(inputs: int = 96, outputs: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and correlated inputs of very different size, as layers of language models see them."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(inputs, inputs, generator=generator) * torch.rand(inputs, generator=generator) * 3
    x = torch.randn(600, inputs, generator=generator) @ mixed / inputs**0.5
    return torch.randn(outputs, inputs, generator=generator) * 0.05, x


def exact_inputs(x: torch.Tensor) -> Curvature:
    """Inputs that are what they should be."""
    return Curvature(x.t() @ x, x.t() @ x)


def error(weight: torch.Tensor, rounded: Quantized, x: torch.Tensor) -> float:
    return float((x @ (rounded.dequantize() - weight).t()).norm() / (x @ weight.t()).norm())


@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_products_change_less_than_with_rounding_to_nearest(scheme: Scheme, desc_act: bool) -> None:
    weight, x = layer()
    before = weight.clone()
    rounded = quantize(weight, exact_inputs(x), Recipe(scheme, desc_act))
    nearest = round_to_nearest(weight, scheme)
    assert torch.equal(weight, before)
    assert error(weight, rounded, x) < 0.85 * error(weight, nearest, x)
    count = 1 if scheme.group_size == -1 else -(-96 // scheme.group_size)
    for each in (rounded, nearest):
        assert each.numbers.shape == (96, 40) and each.zeros.shape == each.scales.shape == (count, 40)
        assert int(each.numbers.max()) < 2**scheme.bits and each.scales.dtype == torch.float16
        assert not scheme.sym or bool((each.zeros == 2 ** (scheme.bits - 1)).all())
    even = torch.arange(96) // (96 if scheme.group_size == -1 else scheme.group_size)
    assert torch.equal(nearest.groups, even)
    assert torch.equal(rounded.groups.sort().values, even)
    assert torch.equal(rounded.groups, even) == (not desc_act or count == 1)


def test_scales_belong_to_their_groups_whatever_the_order_of_rounding() -> None:
    """Groups of very different size: a scale in the wrong place would be far off."""
    weight, _ = layer()
    x = torch.randn(600, 96, generator=torch.Generator().manual_seed(1))  # nothing to make up for elsewhere
    for group, factor in enumerate((0.01, 1.0, 0.1)):
        weight[:, 32 * group : 32 * (group + 1)] *= factor
    x[:, 64:] *= 10  # the last group comes first
    rounded = quantize(weight, exact_inputs(x), Recipe(Scheme(4, 32, sym=True)))
    sizes = rounded.scales.float().abs().mean(1)
    assert sizes[1] > 5 * sizes[2] > 25 * sizes[0]
    for group in (1, 2):  # the first is so small that it is mostly what makes up for the others
        columns = slice(32 * group, 32 * (group + 1))
        part = weight[:, columns]
        assert (rounded.dequantize()[:, columns] - part).norm() < 0.3 * part.norm()


def test_a_smaller_last_group_keeps_its_place() -> None:
    weight, x = layer(inputs=80)
    x[:, 64:] *= 10
    rounded = quantize(weight, exact_inputs(x), Recipe(Scheme(4, 32, sym=False)))
    assert torch.equal(rounded.groups, torch.arange(80) // 32)
    assert error(weight, rounded, x) < 0.95 * error(weight, round_to_nearest(weight, Scheme(4, 32, sym=False)), x)


def test_inputs_that_are_always_0_or_the_same() -> None:
    weight, x = layer()
    x[:, 5] = 0.0
    x[:, 7] = x[:, 8]
    rounded = quantize(weight, exact_inputs(x), Recipe(SCHEMES[0], damping=1e-9))  # singular but for more damping
    assert bool(rounded.dequantize().isfinite().all())
    assert error(weight, rounded, x) < 0.5


@pytest.mark.parametrize("damping", [0.0, -0.1, float("nan"), float("inf")])
def test_damping_that_doubling_would_never_make_enough(damping: float) -> None:
    with pytest.raises(ValueError, match="must be a number above 0"):
        Recipe(SCHEMES[0], damping=damping)


def test_activations_that_are_not_finite() -> None:
    weight, x = layer()
    x[3, 3] = torch.inf
    with pytest.raises(ModelError, match="not finite"):
        quantize(weight, exact_inputs(x), Recipe(SCHEMES[0]))


@pytest.mark.parametrize("desc_act", [False, True])
def test_errors_that_come_in_with_the_inputs_are_made_up_for(desc_act: bool) -> None:
    weight, x = layer()
    rough = x + 0.1 * x.roll(1, dims=1)
    recipe = Recipe(Scheme(4, 32, sym=True), desc_act, damping=1e-3)

    def error_of(rounded: Quantized) -> float:
        exact = x @ weight.t()
        return float((rough @ rounded.dequantize().t() - exact).norm() / exact.norm())

    unaware = quantize(weight, exact_inputs(rough), recipe)
    aware = quantize(weight, Curvature(rough.t() @ rough, rough.t() @ x), recipe)
    assert error_of(aware) < 0.7 * error_of(unaware)


def test_scales_are_improved_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = layer()
    recipe = Recipe(Scheme(4, 32, sym=True))
    improved = quantize(weight, exact_inputs(x), recipe)
    monkeypatch.setattr(_Columns, "_improve_scales", lambda *_: None)
    assert error(weight, improved, x) < 0.99 * error(weight, quantize(weight, exact_inputs(x), recipe), x)
