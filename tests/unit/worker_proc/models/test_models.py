"""Networks against transformers: the same logits within 1e-4, however the tokens are cut into steps."""

import functools
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch

from folovllm.common.model_config import read_model_config
from folovllm.worker_proc.attention.backend import AttentionBackend
from folovllm.worker_proc.attention.paged import PagedBackend
from folovllm.worker_proc.attention.torch_naive import TorchNaiveBackend
from folovllm.worker_proc.device import Placement
from folovllm.worker_proc.kv_tensors import KVTensors
from folovllm.worker_proc.layers.linear import DenseLinears, LinearLayer
from folovllm.worker_proc.models.registry import MODELS, build_model
from folovllm.worker_proc.weights import fill_dummy_weights, load_weights
from tests.fakes.attention import PagedRequest, build_metadata
from tests.fakes.network_runner import NetworkRunner
from tests.fakes.tiny_models import (
    FAMILIES,
    MAX_POSITIONS,
    ROPES,
    VOCAB_SIZE,
    edit_config,
    load_reference,
    make_model,
)

TOLERANCE = 1e-4
BLOCK_SIZE = 8
FLOAT32 = Placement(torch.device("cpu"), torch.float32)
PROMPTS = [37, 1, 16, 55]  # lengths: inside a block, one token, on a block's border, several blocks


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def make_runner(folder: pathlib.Path, backend: str, max_model_len: int = MAX_POSITIONS) -> NetworkRunner:
    heads = read_model_config(folder).num_attention_heads
    chosen: AttentionBackend = PagedBackend(heads) if backend == "paged" else TorchNaiveBackend()
    return NetworkRunner(folder, chosen, FLOAT32, max_model_len, BLOCK_SIZE)


def prompts_of(lengths: list[int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCAB_SIZE, (length,), generator=generator) for length in lengths]


def reference_logits(folder: pathlib.Path, prompts: list[torch.Tensor]) -> list[torch.Tensor]:
    reference: Any = load_reference(folder)
    return [reference(prompt[None]).logits[0] for prompt in prompts]


def assert_close(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, atol=TOLERANCE, rtol=0)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @functools.cache
    def make(family: str, rope: str) -> pathlib.Path:
        folder = tmp_path_factory.mktemp(f"{family}-{rope}")
        with torch.inference_mode(False):
            return make_model(folder, family, rope=rope)

    return make


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(tiny: Any, family: str, rope: str) -> None:
    folder = tiny(family, rope)
    prompts = prompts_of(PROMPTS)
    expected = reference_logits(folder, prompts)
    assert max(row.std().item() for row in expected) > 0.3  # logits that differ, so that the tolerance means something
    for backend in ("torch_naive", "paged"):
        runner = make_runner(folder, backend)
        assert_close(runner.logits(prompts, [1000]), expected)  # whole prompts
        assert_close(runner.logits(prompts, [13, 3]), expected)  # chunks, cut inside and across blocks
        assert_close(runner.logits(prompts, [9, 1]), expected)  # a chunk, then token by token


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 16), (4, 2, 32), (8, 2, 8), (4, 1, 24)])
@pytest.mark.parametrize("family", FAMILIES)
def test_L39_head_dim_and_grouped_heads(
    tmp_path: pathlib.Path, family: str, heads: int, kv_heads: int, head_dim: int
) -> None:
    with torch.inference_mode(False):
        make_model(tmp_path, family, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim)
    prompts = prompts_of([20, 9])
    expected = reference_logits(tmp_path, prompts)
    for backend in ("torch_naive", "paged"):
        assert_close(make_runner(tmp_path, backend).logits(prompts, [8, 1]), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_L39_theta_in_both_spellings(tmp_path: pathlib.Path, family: str) -> None:
    with torch.inference_mode(False):
        make_model(tmp_path, family, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    prompts = prompts_of([40])
    expected = reference_logits(tmp_path, prompts)
    assert_close(make_runner(tmp_path, "paged").logits(prompts, [1000]), expected)
    edit_config(tmp_path, remove=("rope_parameters",), rope_theta=1e6, rope_scaling=None)
    assert_close(reference_logits(tmp_path, prompts), expected)
    assert_close(make_runner(tmp_path, "paged").logits(prompts, [1000]), expected)
    edit_config(tmp_path, rope_theta=1e4)
    assert (make_runner(tmp_path, "paged").logits(prompts, [1000])[0] - expected[0]).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen3", {"attention_bias": True}),
        ("llama", {"tie_word_embeddings": True}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {"tie_word_embeddings": True}),
    ],
)
def test_biases_and_tied_heads(tmp_path: pathlib.Path, family: str, changes: dict[str, Any]) -> None:
    with torch.inference_mode(False):
        make_model(tmp_path, family, **changes)
    prompts = prompts_of([21])
    assert_close(make_runner(tmp_path, "paged").logits(prompts, [8]), reference_logits(tmp_path, prompts))


@pytest.mark.parametrize(
    "extra",
    [
        {"attention_factor": 1.25},
        {"mscale": 0.8, "mscale_all_dim": 0.4},
        {"beta_fast": 8.0, "beta_slow": 2.0},
        {"truncate": False},
    ],
)
def test_yarn_options(tmp_path: pathlib.Path, extra: dict[str, Any]) -> None:
    with torch.inference_mode(False):
        make_model(tmp_path, "llama", rope_parameters=ROPES["yarn"] | extra)
    prompts = prompts_of([90])
    assert_close(make_runner(tmp_path, "paged").logits(prompts, [1000]), reference_logits(tmp_path, prompts))


def test_dynamic_rope_beyond_the_original_length_is_one_fixed_table(tiny: Any) -> None:
    folder = tiny("llama", "dynamic")
    longest = 2 * MAX_POSITIONS
    runner = make_runner(folder, "paged", max_model_len=longest)
    prompt = prompts_of([longest])
    whole = runner.logits(prompt, [1000])
    assert_close(whole, reference_logits(folder, prompt))  # transformers' table for a prompt of the longest length
    assert_close(runner.logits(prompt, [100, 7]), whole)
    short = [prompt[0][:30]]
    assert_close(runner.logits(short, [1000]), [whole[0][:30]])  # a prefix keeps its numbers whatever follows


def test_steps_that_mix_decodes_and_chunks_of_very_different_lengths(tiny: Any) -> None:
    folder = tiny("qwen3", "default")
    prompts = prompts_of([3, 120, 60, 10, 33])
    expected = reference_logits(folder, prompts)
    assert_close(make_runner(folder, "paged").logits(prompts, [2, 1, 5, 1]), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_stays_near_float32(tiny: Any, family: str) -> None:
    folder = tiny(family, "default")
    config = read_model_config(folder)
    prompt = prompts_of([24])[0]
    placement = Placement(torch.device("cpu"), torch.bfloat16)
    model = build_model(config, placement, MAX_POSITIONS)
    load_weights(model, folder)
    kv = KVTensors(config, 4, BLOCK_SIZE, placement)
    metadata = build_metadata([PagedRequest([3, 1, 2])], [24], BLOCK_SIZE)
    hidden = model.forward(prompt, torch.arange(24), PagedBackend(4).begin_step(kv, metadata))
    logits = model.compute_logits(hidden)
    assert logits.dtype == torch.bfloat16
    expected = reference_logits(folder, [prompt])[0]
    assert (logits.float() - expected).abs().mean() < 0.05 * expected.std()


def test_registry_names_its_classes() -> None:
    for architecture, model_class in MODELS.items():
        assert isinstance(model_class, type) and model_class.__name__ == architecture


def test_dummy_weights_are_a_function_of_the_seed(tiny: Any) -> None:
    config = read_model_config(tiny("qwen3", "default"))
    drawn = []
    for seed in (3, 3, 4):
        model = build_model(config, FLOAT32, MAX_POSITIONS)
        fill_dummy_weights(model, seed)
        drawn.append(dict(model.checkpoint_tensors()))
    name = "model.layers.1.self_attn.k_proj.weight"
    assert torch.equal(drawn[0][name], drawn[1][name]) and not torch.equal(drawn[0][name], drawn[2][name])
    assert 0.018 < drawn[0][name].std() < 0.022
    assert torch.equal(drawn[0]["model.layers.0.self_attn.q_norm.weight"], torch.ones(16))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_maker_is_asked_for_every_linear_layer_by_its_full_name(tiny: Any, family: str) -> None:
    config = read_model_config(tiny(family, "default"))
    asked: list[tuple[str, tuple[int, ...]]] = []

    class Recorder(DenseLinears):
        def __call__(
            self, prefix: str, in_features: int, parts: Mapping[str, int], /, *, bias: bool = False
        ) -> LinearLayer:
            asked.extend((f"{prefix}{name}.weight", (size, in_features)) for name, size in parts.items())
            asked.extend((f"{prefix}{name}.bias", (size,)) for name, size in parts.items() if bias)
            return super().__call__(prefix, in_features, parts, bias=bias)

    model = build_model(config, FLOAT32, MAX_POSITIONS, Recorder(FLOAT32))
    tensors = {name: tuple(place.shape) for name, place in model.checkpoint_tensors()}
    others = {name for name in tensors if "norm" in name or "embed" in name}
    assert dict(asked) == {name: shape for name, shape in tensors.items() if name not in others}
    assert len(asked) == len(dict(asked)) >= 7 * config.num_hidden_layers + 1
