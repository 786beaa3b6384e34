import torch

from folovllm.common.model_config import ModelConfig, RopeConfig
from folovllm.worker_proc.device import Placement
from folovllm.worker_proc.kv_tensors import KVTensors, bytes_per_block

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=10,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    rms_norm_eps=1e-6,
    rope=RopeConfig(),
    max_position_embeddings=64,
)


def filled(num_blocks: int = 5, block_size: int = 8) -> KVTensors:
    kv = KVTensors(CONFIG, num_blocks, block_size, Placement(torch.device("cpu"), torch.float32))
    assert not kv.data.any()
    kv.data.copy_(torch.arange(kv.data.numel()).view(kv.data.shape))
    return kv


def test_bytes_per_block_is_what_is_allocated() -> None:
    kv = filled()
    assert bytes_per_block(CONFIG, torch.float32, 8) * 5 == kv.data.numel() * 4
    assert bytes_per_block(CONFIG, torch.bfloat16, 16) == 2 * 3 * 2 * 4 * 2 * 16


def test_block_rows_are_heads_outermost() -> None:
    kv = filled()
    rows = kv.block_row_ids(torch.tensor([[3, 1], [4, 0]]))
    gathered = kv.block_rows(2).index_select(0, rows).view(2, 2, 4, 8, 4)
    assert torch.equal(gathered, kv.layer(2)[:, :, [3, 1, 4, 0]])


def test_token_rows_are_tokens_outermost() -> None:
    kv = filled()
    slots = torch.tensor([3 * 8 + 7, 1 * 8 + 0])
    gathered = kv.token_rows(1).index_select(0, kv.token_row_ids(slots)).view(2, 2, 2, 4)  # token, kind, head, dim
    assert torch.equal(gathered[0], kv.layer(1)[:, :, 3, 7])
    assert torch.equal(gathered[1], kv.layer(1)[:, :, 1, 0])


def test_rows_share_memory_with_the_cache() -> None:
    kv = filled()
    kv.token_rows(0).fill_(-1.0)
    assert (kv.data[0] == -1).all() and (kv.data[1:] != -1).all()


def test_copy_blocks_reads_all_sources_first() -> None:
    kv = filled()
    before = kv.data.clone()
    kv.copy_blocks(torch.tensor([1, 2]), torch.tensor([2, 3]))
    assert torch.equal(kv.data[:, :, :, 2], before[:, :, :, 1])
    assert torch.equal(kv.data[:, :, :, 3], before[:, :, :, 2])
    assert torch.equal(kv.data[:, :, :, [0, 1, 4]], before[:, :, :, [0, 1, 4]])


def test_an_fp8_cache_takes_a_byte_a_number_and_its_blocks_move_alike() -> None:
    kv = KVTensors(CONFIG, 5, 8, Placement(torch.device("cpu"), torch.bfloat16, fp8_cache=True))
    assert not kv.data.float().any() and kv.data.nbytes == bytes_per_block(CONFIG, torch.float8_e4m3fn, 8) * 5
    assert 2 * bytes_per_block(CONFIG, torch.float8_e4m3fn, 8) == bytes_per_block(CONFIG, torch.bfloat16, 8)
    kv.data[:, :, :, 2] = 3.5
    kv.copy_blocks(torch.tensor([2]), torch.tensor([4]))
    kv.zero_blocks(torch.tensor([2]))
    assert kv.data.float().unique_consecutive(dim=3)[0, 0, 0, :, 0, 0].tolist() == [0.0, 3.5]
    assert kv.scales is not None and kv.scales.shape == (3, 2, 2) and (kv.scales == 1).all()
    assert filled().scales is None and filled().layer_scales(0) is None


def test_a_layer_knows_its_scales() -> None:
    scales = torch.arange(12.0).view(3, 2, 2)
    kv = KVTensors(CONFIG, 2, 8, Placement(torch.device("cpu"), torch.float32, fp8_cache=True), scales)
    found = kv.layer_scales(1)
    assert found is not None and found.tolist() == [[4.0, 5.0], [6.0, 7.0]]
