"""Whole tiny models of every format against the same numbers unquantized; words that the files contradict."""

import json
import logging
import pathlib
from typing import Any

import pytest
import safetensors.torch
import torch

from folovllm.common.errors import ModelError
from folovllm.common.model_config import read_model_config
from folovllm.worker_proc.attention.torch_naive import TorchNaiveBackend
from folovllm.worker_proc.device import Placement
from folovllm.worker_proc.kv_tensors import KVTensors
from folovllm.worker_proc.layers.int4_words import Int4Words, pack_words
from folovllm.worker_proc.layers.linear import Linear
from folovllm.worker_proc.layers.side_by_side import SideBySide
from folovllm.worker_proc.models.registry import CausalLM, build_model
from folovllm.worker_proc.quantization.config import read_gptq_config
from folovllm.worker_proc.quantization.gptq import GPTQLinear, GPTQLinears
from folovllm.worker_proc.quantization.registry import linear_maker
from folovllm.worker_proc.quantization.storage import Quantized
from folovllm.worker_proc.weights import fill_dummy_weights, load_weights, stored_shapes
from tests.fakes.attention import PagedRequest, build_metadata
from tests.fakes.gptq_models import Format, make_gptq_model, move_to_quantize_config, pack_weight
from tests.fakes.tiny_models import FAMILIES, edit_config, edit_tensors

FLOAT32 = Placement(torch.device("cpu"), torch.float32)
IDS = torch.tensor([5, 17, 150, 3, 88, 41, 9])


def load(folder: pathlib.Path, placement: Placement = FLOAT32) -> CausalLM:
    config = read_model_config(folder)
    model = build_model(config, placement, 64, linear_maker(config, placement, folder))
    load_weights(model, folder)
    return model


@torch.inference_mode()
def logits_of(folder: pathlib.Path, placement: Placement = FLOAT32) -> torch.Tensor:
    kv = KVTensors(read_model_config(folder), 2, 8, placement)
    step = TorchNaiveBackend().begin_step(kv, build_metadata([PagedRequest([1])], [len(IDS)], 8))
    model = load(folder, placement)
    return model.compute_logits(model.forward(IDS, torch.arange(len(IDS)), step)).float()


def assert_same(quantized: pathlib.Path, plain: pathlib.Path) -> None:
    torch.testing.assert_close(logits_of(quantized), logits_of(plain), atol=2e-4, rtol=1e-4)


FORMATS = {
    "symmetric": Format(),
    "asymmetric": Format(sym=False, group_size=16),
    "v2": Format(format="gptq_v2", sym=False),
    "no groups": Format(group_size=-1),
    "no groups, no g_idx": Format(group_size=-1, g_idx=False),
    "a last group that is smaller": Format(group_size=64, sym=False),
    "groups, no g_idx": Format(g_idx=False),
    "activation order": Format(order="shuffled"),
    "activation orders of their own": Format(order="own", sym=False, format="gptq_v2"),
    "8 bits": Format(bits=8, order="shuffled", sym=False),
}


@pytest.mark.parametrize("name", list(FORMATS))
def test_L40_a_model_of_every_format(tmp_path: pathlib.Path, name: str) -> None:
    assert_same(*make_gptq_model(tmp_path, "llama", FORMATS[name]))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_with_its_biases_in_activation_order(tmp_path: pathlib.Path, family: str) -> None:
    biases: dict[str, Any] = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
    assert_same(*make_gptq_model(tmp_path, family, Format(order="own"), **biases))


@pytest.mark.parametrize("name", ["symmetric", "asymmetric", "activation orders of their own"])
def test_bfloat16_stays_near_the_same_numbers_in_float32(tmp_path: pathlib.Path, name: str) -> None:
    quantized, plain = make_gptq_model(tmp_path, "llama", FORMATS[name])
    actual = logits_of(quantized, Placement(torch.device("cpu"), torch.bfloat16))
    expected = logits_of(plain)
    assert (actual - expected).abs().mean() < 0.02 * expected.std()


def test_shards(tmp_path: pathlib.Path) -> None:
    quantized, plain = make_gptq_model(tmp_path, "qwen3", Format())
    stored = safetensors.torch.load_file(quantized / "model.safetensors")
    (quantized / "model.safetensors").unlink()
    names = sorted(stored)
    weight_map: dict[str, str] = {}
    for index, part in enumerate((names[::2], names[1::2])):
        file = f"model-{index + 1:05d}-of-00002.safetensors"
        safetensors.torch.save_file({name: stored[name] for name in part}, quantized / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (quantized / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same(quantized, plain)


def test_fields_in_a_file_of_their_own(tmp_path: pathlib.Path) -> None:
    quantized, plain = make_gptq_model(tmp_path, "llama", Format(order="shuffled"))
    move_to_quantize_config(quantized)
    assert read_model_config(quantized).quantization is not None
    assert_same(quantized, plain)


EXCEPTIONS: dict[str, dict[str, Any]] = {
    "modules_in_block_to_quantize": {"modules_in_block_to_quantize": [["self_attn.q_proj", "self_attn.v_proj"]]},
    "dynamic": {"dynamic": {r"-:.*(k_proj|o_proj)": {}, r"-:.*\.mlp\.": {}}},
}


@pytest.mark.parametrize("name", list(EXCEPTIONS))
def test_exceptions_between_projections_of_one_input(
    tmp_path: pathlib.Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    skip = ("k_proj", "o_proj", "mlp")
    quantized, plain = make_gptq_model(tmp_path, "qwen2", Format(sym=False), skip=skip, config=EXCEPTIONS[name])
    assert_same(quantized, plain)
    assert not caplog.records


def test_a_rule_gives_modules_other_numbers(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    rules = {"dynamic": {"+:.*up_proj": {"bits": 8, "group_size": 16, "sym": False}}}
    quantized, plain = make_gptq_model(tmp_path, "llama", Format(), config=rules)
    for index in range(2):
        name = f"model.layers.{index}.mlp.up_proj"
        packed = pack_weight(torch.randn(96, 64), Format(bits=8, group_size=16, sym=False))
        edit_tensors(quantized, {f"{name}.{kind}": tensor for kind, tensor in packed.tensors.items()})
        edit_tensors(plain, {f"{name}.weight": packed.plain.float()})
    assert_same(quantized, plain)
    assert not caplog.records


@pytest.mark.parametrize("tied", [False, True])
def test_the_head(tmp_path: pathlib.Path, tied: bool) -> None:
    if tied:
        assert_same(*make_gptq_model(tmp_path, "llama", Format(), tie_word_embeddings=True))
    else:
        assert_same(*make_gptq_model(tmp_path, "llama", Format(sym=False), head=True, vocab_size=200))


CONTRADICTIONS: dict[str, tuple[Format, dict[str, Any], str]] = {
    "zeros of v2 called v1": (Format(format="gptq_v2"), {"checkpoint_format": "gptq"}, "gptq_v2 by its symmetric zer"),
    "zeros of v1 called v2": (Format(), {"checkpoint_format": "gptq_v2"}, "gptq by its symmetric zeros, not gptq_v2"),
    "asymmetric called symmetric": (Format(sym=False), {"sym": True}, "zeros are not all in the middle"),
    "another group size": (Format(group_size=16), {"group_size": 32}, "group_size is 16 by the shape of scales, not"),
    "groups called none": (Format(group_size=32), {"group_size": -1}, "group_size is 32 by the shape of scales"),
    "8 bits called 4": (Format(bits=8), {"bits": 4}, "bits are 8 by the shape of qweight, not 4"),
    "an order not mentioned": (Format(order="shuffled"), {"desc_act": False}, "desc_act is so"),
    "quantized, not mentioned": (Format(), {"modules_in_block_to_quantize": ["q_proj"]}, "but stored so: taken so"),
}


@pytest.mark.parametrize("name", list(CONTRADICTIONS))
def test_L40_files_count_where_a_field_contradicts_them(
    tmp_path: pathlib.Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    form, wrong, warning = CONTRADICTIONS[name]
    quantized, plain = make_gptq_model(tmp_path, "llama", form, config=wrong)
    with caplog.at_level(logging.WARNING):
        assert_same(quantized, plain)
    assert [warning in record.getMessage() for record in caplog.records] == [True]  # once, not for every module


def test_a_module_said_to_be_quantized_that_is_not(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    quantized, plain = make_gptq_model(tmp_path, "llama", Format(), skip=("v_proj",))
    with caplog.at_level(logging.WARNING):
        assert_same(quantized, plain)
    assert "model.layers.0.self_attn.v_proj: to be quantized by the configuration" in caplog.text


NAME = "model.layers.1.self_attn.o_proj"
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a group that is none": ({f"{NAME}.g_idx": torch.full((64,), 2, dtype=torch.int32)}, "g_idx names groups 2 to 2"),
    "2 bits": ({f"{NAME}.qweight": torch.zeros(4, 64, dtype=torch.int32)}, "2 bits for 64 inputs"),
    "uneven groups": ({f"{NAME}.scales": torch.ones(5, 64)}, "5 groups of 64 inputs"),
    "a scale that is not finite": ({f"{NAME}.scales": torch.full((2, 64), torch.inf)}, "scales holds a number that is"),
    "a bias where there is none": ({f"{NAME}.bias": torch.ones(64)}, f"{NAME}.bias is not zero"),
    "numbers of another type": ({f"{NAME}.qweight": torch.zeros(8, 64)}, "float32; supported are int32"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_cannot_be_read_is_refused(tmp_path: pathlib.Path, name: str) -> None:
    changes, message = REFUSED[name]
    quantized, _ = make_gptq_model(tmp_path, "llama", Format())
    edit_tensors(quantized, changes)
    with pytest.raises(ModelError, match=message):
        load(quantized)


def test_missing_tensors_are_named(tmp_path: pathlib.Path) -> None:
    quantized, _ = make_gptq_model(tmp_path, "llama", Format())
    edit_tensors(quantized, {}, remove=(f"{NAME}.qweight",))
    with pytest.raises(ModelError, match=rf"{NAME}.qweight' is missing from the checkpoint"):
        load(quantized)
    shuffled, _ = make_gptq_model(tmp_path / "2", "llama", Format(order="shuffled"))
    edit_tensors(shuffled, {}, remove=(f"{NAME}.g_idx",))
    with pytest.raises(ModelError, match=rf"desc_act is set, but there is no {NAME}.g_idx"):
        load(shuffled)


def test_zeros_stored_as_bias_where_the_network_has_none(tmp_path: pathlib.Path) -> None:
    quantized, plain = make_gptq_model(tmp_path, "llama", Format())
    edit_tensors(quantized, {f"{NAME}.bias": torch.zeros(64)})
    assert_same(quantized, plain)


def test_projections_run_together_where_their_inputs_have_the_same_groups(tmp_path: pathlib.Path) -> None:
    for order, kind in (("shuffled", False), ("own", True)):
        quantized, _ = make_gptq_model(tmp_path / order, "llama", Format(order=order))
        model: Any = load(quantized)
        for layer in (model.model.layers[0].self_attn.qkv_proj, model.model.layers[0].mlp.gate_up_proj):
            assert isinstance(layer, GPTQLinear)
            assert isinstance(layer.layer, SideBySide) == kind


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if form.bits == 4])
def test_loading_waits_for_no_device(tmp_path: pathlib.Path, name: str) -> None:
    """The device meta stands for a GPU: an operator that has to know a value there raises an error."""
    biases: dict[str, Any] = {"attention_bias": True, "mlp_bias": True}
    quantized, _ = make_gptq_model(tmp_path, "llama", FORMATS[name], **biases)
    config, far = read_model_config(quantized), Placement(torch.device("meta"), torch.bfloat16)
    made: list[Int4Words] = []

    def make(weight: Quantized, bias: torch.Tensor | None) -> Linear:
        words = pack_words(weight)
        assert words is not None and bias is not None and bias.is_meta
        made.append(words)
        return Linear(words.in_features, {"": words.out_features}, far)

    assert config.quantization is not None
    fields = read_gptq_config(config.quantization.fields)
    linears = GPTQLinears(fields, far, stored_shapes(quantized), lambda: make)
    load_weights(build_model(config, far, 64, linears), quantized)
    assert len(made) >= 4 and all(words.words.is_meta and words.scales.is_meta for words in made)


@pytest.mark.parametrize("form", [Format(), Format(sym=False, bits=8)])
def test_random_weights_from_the_configuration_alone(tmp_path: pathlib.Path, form: Format) -> None:
    quantized, _ = make_gptq_model(tmp_path, "qwen3", form)
    (quantized / "model.safetensors").unlink()
    config = read_model_config(quantized)
    outputs = []
    for seed in (1, 1, 2):
        linears = linear_maker(config, FLOAT32, None)
        model: Any = build_model(config, FLOAT32, 64, linears)
        fill_dummy_weights(model, seed)
        with torch.inference_mode():
            outputs.append(model.model.layers[0].mlp.gate_up_proj(torch.ones(2, 64)))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
    assert 0.05 < outputs[0].std() < (0.5 if form.bits == 4 else 50.0)


def test_sizes_that_do_not_fill_words_are_refused(tmp_path: pathlib.Path) -> None:
    quantized, _ = make_gptq_model(tmp_path, "llama", Format())
    edit_config(quantized, quantization_config=Format().config(lm_head=True))
    config = read_model_config(quantized)
    linears = linear_maker(config, FLOAT32, None)
    assert isinstance(linears, GPTQLinears)
    with pytest.raises(ModelError, match="lm_head has 199 outputs, no multiple of 8"):
        linears("", 64, {"lm_head": 199})
