"""Times one step of the network alone: no processes, no scheduler, no sampling.

    python -m bench.worker_step MODEL_DIR [--dtype bfloat16] [--threads N]

Prints for each shape (requests, tokens of context, new tokens) the milliseconds of the whole forward with logits and of
the attention of all its layers. The lower quartile of the runs is shown: what the machine does when it is left alone.
Attention runs in compiled kernels where there are any ($FOLOVLLM_CPU_KERNELS=torch: in torch's operators).
"""

import argparse
import pathlib
import time
from collections.abc import Callable

import torch

from folovllm.common.model_config import ModelConfig, read_model_config
from folovllm.worker_proc.attention.backend import AttentionMetadata
from folovllm.worker_proc.attention.paged import PagedBackend
from folovllm.worker_proc.device import Placement, choose_device, describe_device, resolve_dtype, set_threads
from folovllm.worker_proc.kernels.cpu.background import CpuKernels
from folovllm.worker_proc.kv_tensors import KVTensors
from folovllm.worker_proc.models.registry import CausalLM, build_model
from folovllm.worker_proc.weights import load_weights

SHAPES = [(1, 255, 1), (16, 255, 1), (64, 255, 1), (1, 0, 128), (1, 0, 1024), (1, 512, 512), (1, 3000, 16)]
BLOCK_SIZE = 16
RUNS = 12


def main() -> None:
    parser = argparse.ArgumentParser(description="Times one step of the network alone.")
    parser.add_argument("model", type=pathlib.Path, help="folder with config.json and safetensors")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    set_threads(options.threads)
    config = read_model_config(options.model)
    placement = Placement(choose_device("cpu"), resolve_dtype(options.dtype, config.dtype))
    start = time.perf_counter()
    model = build_model(config, placement, config.default_max_model_len)
    load_weights(model, options.model)
    print(f"{describe_device(placement.device)}, {placement.dtype}, loaded in {time.perf_counter() - start:.2f} s")
    kernels = CpuKernels(config, BLOCK_SIZE, placement)
    kernels.attention.wait()
    kernels.chunks.wait()
    backend = PagedBackend(config.num_attention_heads, kernels.attention, kernels.chunks)
    print(f"{'requests':>8} {'context':>8} {'new':>6} {'step ms':>9} {'attention ms':>13}")
    with torch.inference_mode():
        for requests, context, new in SHAPES:
            step_ms, attention_ms = time_shape(model, config, placement, backend, (requests, context, new))
            print(f"{requests:8} {context:8} {new:6} {step_ms:9.2f} {attention_ms:13.2f}")


def time_shape(
    model: CausalLM, config: ModelConfig, placement: Placement, backend: PagedBackend, shape: tuple[int, int, int]
) -> tuple[float, float]:
    """Milliseconds of a whole step, and of its attention."""
    requests, context, new = shape
    metadata, positions = random_step(requests, context, new)
    kv = KVTensors(config, int(metadata.block_table.max()) + 1, BLOCK_SIZE, placement)
    ids = torch.randint(0, config.vocab_size, positions.shape)
    heads = torch.randn(
        len(ids), config.num_attention_heads + 2 * config.num_key_value_heads, config.head_dim, dtype=placement.dtype
    )

    def whole() -> None:
        model.compute_logits(model.forward(ids, positions, backend.begin_step(kv, metadata))[-requests:])

    def attention() -> None:
        step = backend.begin_step(kv, metadata)
        for layer in range(config.num_hidden_layers):
            step.attend(layer, heads[:, : config.num_attention_heads], heads[:, config.num_attention_heads :])

    return quartile_ms(whole), quartile_ms(attention)


def random_step(requests: int, context: int, new: int) -> tuple[AttentionMetadata, torch.Tensor]:
    """A step of equal requests whose blocks lie in random order, and the positions of its tokens."""
    blocks = (torch.randperm(requests * -(-(context + new) // BLOCK_SIZE)) + 1).view(requests, -1)
    positions = torch.arange(context, context + new)
    slots = blocks[:, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    seq_lens = [context + new] * requests
    metadata = AttentionMetadata(
        query_lens=[new] * requests,
        seq_lens=seq_lens,
        num_decodes=requests if new == 1 else 0,
        block_table=blocks,
        slot_mapping=slots.flatten(),
        seq_lens_device=torch.tensor(seq_lens),
    )
    return metadata, positions.repeat(requests)


def quartile_ms(run: Callable[[], None]) -> float:
    """Lower quartile of the milliseconds that `run` takes."""
    run()
    seconds = []
    for _ in range(RUNS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[RUNS // 4] * 1e3


if __name__ == "__main__":
    main()
