"""What `bench.gpu` needs for a model's copy with 4-bit weights: the copy, its bytes, and the goals of milestone 7."""

import json
import pathlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

GROUP_SIZE = 128
BITS = 4
_SCALE = 0.02 / 4.6  # numbers from 0 to 15 spread with a standard deviation of 4.6: weights as `bench.make_model` draws
_ZEROS = 0x77777777  # eights, stored minus one
GOALS_MS = {1: 0.92, 8: 1.1, 32: 1.45, 64: 1.9, 256: 4.9}  # of a step of so many requests, on an H100
GOAL_BYTES, GOAL_PREFILL, GOAL_LOAD = 0.28, 0.9, 1.5  # times bf16's
_WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Measured:
    """Of one model: ms of a step by number of requests, rate of prompts, seconds to load the weights."""

    step_ms: dict[int, float]
    prompt_tokens_per_s: float
    load_s: float


def write_copy(source: pathlib.Path, target: pathlib.Path, seed: int = 0) -> None:
    """Writes `source` to `target` as a GPTQ checkpoint (4 bits, groups of 128, symmetric) of random numbers.

    Without model.safetensors in `source` there is none in `target` either: weights are random in any case, and what is
    read from files only shows in the time to load them.
    """
    target.mkdir(parents=True)
    config: dict[str, Any] = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "gptq",
        "bits": BITS,
        "group_size": GROUP_SIZE,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "gptq",
    }
    (target / "config.json").write_text(json.dumps(config, indent=2))
    for path in source.glob("tokenizer*"):
        (target / path.name).write_bytes(path.read_bytes())
    if (source / _WEIGHTS).exists():
        _write_tensors(source / _WEIGHTS, target / _WEIGHTS, seed)


def _write_tensors(source: pathlib.Path, target: pathlib.Path, seed: int) -> None:
    import safetensors.torch  # torch takes seconds to load, and the frontend needs none
    import torch

    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in safetensors.torch.load_file(source).items():
        module = name.removesuffix(".weight")
        if not module.endswith("_proj"):
            tensors[name] = tensor
            continue
        outputs, inputs = tensor.shape
        groups = -(-inputs // GROUP_SIZE)
        words = torch.randint(-(2**31), 2**31, (inputs * BITS // 32, outputs), generator=generator)
        tensors[f"{module}.qweight"] = words.to(torch.int32)
        tensors[f"{module}.qzeros"] = torch.full((groups, outputs * BITS // 32), _ZEROS, dtype=torch.int32)
        tensors[f"{module}.scales"] = torch.full((groups, outputs), _SCALE, dtype=torch.float16)
        tensors[f"{module}.g_idx"] = (torch.arange(inputs) // GROUP_SIZE).to(torch.int32)
    safetensors.torch.save_file(tensors, target, metadata={"format": "pt"})


def layer_bytes(folder: pathlib.Path, device: str) -> int:
    """What the linear layers' weights take on the device, for the model in `folder` with random numbers."""
    import torch

    from folovllm.common.model_config import read_model_config
    from folovllm.worker_proc.device import choose_device, place
    from folovllm.worker_proc.models.registry import build_model
    from folovllm.worker_proc.quantization.registry import linear_maker
    from folovllm.worker_proc.weights import fill_dummy_weights

    config, placement = read_model_config(folder), place(choose_device(device), torch.bfloat16)
    with torch.inference_mode():
        model = build_model(config, placement, 64, linear_maker(config, placement, None))
        fill_dummy_weights(model, 0)
    total = sum(
        linear.num_bytes
        for layer in model.parts().layers
        for linear in (layer.qkv, layer.out, layer.gate_up, layer.down)
    )
    del model
    torch.cuda.empty_cache()  # for the engines that come after
    return total


def measure_both(source: pathlib.Path, device: str, run: Callable[[pathlib.Path, str], Measured]) -> list[list[object]]:
    """Rows of a table: what `run` (folder, label) measures of the model in bf16 and of its copy, beside the goals."""
    with tempfile.TemporaryDirectory() as parent:
        copy = pathlib.Path(parent) / "four_bits"
        write_copy(source, copy)
        bf16, four = run(source, "bf16"), run(copy, "4 bits")
        bytes_ratio = layer_bytes(copy, device) / layer_bytes(source, device)
    rows: list[list[object]] = [
        [f"step of {count}, ms", round(ms, 3), round(four.step_ms[count], 3), _at_most(GOALS_MS.get(count))]
        for count, ms in bf16.step_ms.items()
    ]
    rows.append(["layer weights, times bf16's", 1, round(bytes_ratio, 3), _at_most(GOAL_BYTES)])
    prefill = four.prompt_tokens_per_s / bf16.prompt_tokens_per_s
    rows.append(["prompt tokens/s, times bf16's", 1, round(prefill, 3), f">= {GOAL_PREFILL}"])
    if (source / _WEIGHTS).exists():
        rows.append(["load, times bf16's", 1, round(four.load_s / bf16.load_s, 3), _at_most(GOAL_LOAD)])
    return rows


def _at_most(goal: float | None) -> str:
    return "" if goal is None else f"<= {goal}"
