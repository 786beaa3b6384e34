"""A network of 4-bit weights in the compiled decode step, against the same weights one product after another."""

import pathlib

import pytest
import torch

pytest.importorskip("llvmlite", reason="kernels for the CPU are compiled by llvmlite")

from folovllm.common.model_config import read_model_config
from folovllm.worker_proc.attention.paged import PagedBackend
from folovllm.worker_proc.device import Placement
from folovllm.worker_proc.kernels.cpu.chunk_attention import ChunkAttention
from folovllm.worker_proc.kernels.cpu.compiled import prepare
from folovllm.worker_proc.kernels.cpu.decode_attention import DecodeAttention, HeadShape
from folovllm.worker_proc.kernels.cpu.network import CompiledNetwork, plan_network
from folovllm.worker_proc.kernels.cpu.team import find_team
from folovllm.worker_proc.kernels.cpu.wide_step import wide_form
from folovllm.worker_proc.kv_tensors import KVTensors
from folovllm.worker_proc.layers.int4_layout import Int4Layout
from folovllm.worker_proc.models.registry import CausalLM, build_model
from folovllm.worker_proc.quantization.registry import linear_maker
from folovllm.worker_proc.weights import load_weights
from tests.fakes.attention import PagedRequest, build_metadata, positions_of
from tests.fakes.gptq_models import Format, make_gptq_model

BLOCK_SIZE = 16


@pytest.mark.parametrize("form", [Format(), Format(sym=False, group_size=16)])
@torch.inference_mode()
def test_the_step_and_the_head_take_4_bit_weights(tmp_path: pathlib.Path, form: Format) -> None:
    folder, _ = make_gptq_model(tmp_path, "llama", form, head=True, vocab_size=224, head_dim=32)
    config, placement = read_model_config(folder), Placement(torch.device("cpu"), torch.bfloat16)
    model = build_model(config, placement, 64, linear_maker(config, placement, folder))
    load_weights(model, folder)
    parts, team = model.parts(), find_team()
    if team is None or parts.head.blocked is None:
        pytest.skip("no kernels for 4-bit weights on this machine")
    assert isinstance(parts.head.blocked.layout, Int4Layout)
    prepare()
    kv = KVTensors(config, 6, BLOCK_SIZE, placement)
    kv.data.copy_(torch.randn(kv.data.shape, generator=torch.Generator().manual_seed(0)))
    plan = plan_network(parts, kv, config.num_attention_heads)
    assert plan is not None and config.num_attention_heads == 4
    heads = HeadShape(2, 2, 32, BLOCK_SIZE, "bfloat16")
    network = CompiledNetwork(plan, DecodeAttention(heads, team), ChunkAttention(heads, team), kv, team, None)
    has_wide_steps = wide_form(tiles_allowed=False) is not None
    requests = [PagedRequest([4, 1], 20), PagedRequest([2], 3), PagedRequest([3], 9)]
    for lens in [[1, 1, 1], [1, 1, 6]] if has_wide_steps else [[1, 1, 1]]:
        check_step(model, network, kv, requests, lens)


def check_step(
    model: CausalLM, network: CompiledNetwork, kv: KVTensors, requests: list[PagedRequest], lens: list[int]
) -> None:
    metadata, positions = build_metadata(requests, lens, BLOCK_SIZE), positions_of(requests, lens)
    ids = torch.tensor([5, 150, 7, 12, 99, 3, 44, 160])[: sum(lens)]
    step = PagedBackend(4).begin_step(kv, metadata)
    expected = model.compute_logits(model.forward(ids, positions, step)).float()
    hidden = network.forward(ids, positions, metadata)
    assert hidden is not None
    actual = network.logits(hidden)
    assert actual is not None
    assert (actual - expected).abs().mean() < 0.02 * expected.std()
