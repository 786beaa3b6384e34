"""GPTQ checkpoints, packed number by number as the formats say: an independent writing of what the worker reads."""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
import safetensors.torch
import torch

from tests.fakes.tiny_models import edit_config, make_model

_SAME_INPUT = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


@dataclasses.dataclass(frozen=True)
class Format:
    """How to store a weight.

    Attributes:
        order: "even" (no g_idx shuffled), "shuffled" (a random deal, one for all projections of an input) or "own"
            (another deal for each projection).
        format: "gptq" or "gptq_v2".
        g_idx: whether g_idx is stored.
    """

    bits: int = 4
    group_size: int = 32
    sym: bool = True
    order: str = "even"
    format: str = "gptq"
    g_idx: bool = True

    def config(self, **changes: Any) -> dict[str, Any]:
        """The fields of `quantization_config`."""
        return {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group_size,
            "sym": self.sym,
            "desc_act": self.order != "even",
            "checkpoint_format": self.format,
        } | changes


@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """A weight [N, K] as stored, and in plain numbers."""

    tensors: dict[str, torch.Tensor]
    plain: torch.Tensor


def pack_weight(weight: torch.Tensor, form: Format, seed: int = 0) -> PackedWeight:
    """Rounds `weight` [N, K] to nearest and packs it; scales are float16."""
    outputs, inputs = weight.shape
    size = inputs if form.group_size == -1 else form.group_size
    groups = np.arange(inputs) // size
    if form.order != "even":
        groups = np.random.default_rng(seed).permutation(groups)
    count, top = int(groups.max()) + 1, 2**form.bits - 1
    numbers = np.zeros((inputs, outputs), np.int64)
    zeros, scales = np.zeros((count, outputs), np.int64), np.zeros((count, outputs), np.float16)
    values = weight.double().numpy().T
    for group in range(count):
        members = np.flatnonzero(groups == group)
        part = values[members]
        if form.sym:
            scale = np.abs(part).max(0) * 2 / top
            zero = np.full(outputs, 2 ** (form.bits - 1))
        else:
            low, high = np.minimum(part.min(0), -1e-4), np.maximum(part.max(0), 1e-4)
            scale = (high - low) / top
            zero = np.maximum(np.rint(-low / scale), 1)
        scales[group], zeros[group] = scale, zero
        rounded = np.rint(part / scales[group].astype(np.float64)) + zero
        numbers[members] = np.clip(rounded, 0, top)
    plain = ((numbers - zeros[groups]) * scales[groups].astype(np.float64)).T
    stored_zeros = zeros - 1 if form.format == "gptq" else zeros
    tensors = {
        "qweight": torch.from_numpy(_words(numbers, form.bits)),
        "qzeros": torch.from_numpy(np.ascontiguousarray(_words(stored_zeros.T, form.bits).T)),
        "scales": torch.from_numpy(scales),
    }
    if form.g_idx:
        tensors["g_idx"] = torch.from_numpy(groups.astype(np.int32))
    return PackedWeight(tensors, torch.from_numpy(np.ascontiguousarray(plain)))


def make_gptq_model(
    folder: pathlib.Path,
    family: str,
    form: Format,
    *,
    skip: tuple[str, ...] = (),
    head: bool = False,
    config: dict[str, Any] | None = None,
    **changes: Any,
) -> tuple[pathlib.Path, pathlib.Path]:
    """A tiny model twice: quantized, and with the same numbers unquantized in float32.

    Args:
        skip: modules whose name holds one of these stay unquantized.
        head: whether lm_head is quantized.
        config: fields of `quantization_config` instead of, or beside, the format's.
        changes: fields of config.json.
    """
    quantized, plain = folder / "quantized", folder / "plain"
    for each in (quantized, plain):
        make_model(each, family, **changes)
    tensors = safetensors.torch.load_file(quantized / "model.safetensors")
    exact = dict(tensors)
    for name in sorted(tensors):
        module = name.removesuffix(".weight")
        is_linear = "_proj" in module or (head and module == "lm_head")
        if not is_linear or name == module or any(part in module for part in skip):
            continue
        parent, _, projection = module.rpartition(".")
        own = projection if form.order == "own" else _SAME_INPUT.get(projection, projection)
        packed = pack_weight(tensors.pop(name), form, seed=sum(f"{parent}.{own}".encode()))
        tensors |= {f"{module}.{kind}": tensor for kind, tensor in packed.tensors.items()}
        exact[name] = packed.plain.float()
    for path, content in ((quantized, tensors), (plain, exact)):
        safetensors.torch.save_file(content, path / "model.safetensors", metadata={"format": "pt"})
    edit_config(quantized, quantization_config=form.config(lm_head=head) | (config or {}))
    return quantized, plain


def move_to_quantize_config(folder: pathlib.Path) -> None:
    """From `quantization_config` in config.json to the file of its own that AutoGPTQ writes."""
    fields = json.loads((folder / "config.json").read_text())["quantization_config"]
    del fields["quant_method"]
    edit_config(folder, remove=("quantization_config",))
    (folder / "quantize_config.json").write_text(json.dumps(fields))


def _words(values: Any, bits: int) -> Any:
    """[R, C] → int32 [R · bits / 32, C]: the first row of each word in its lowest bits, negative numbers modulo."""
    per_word = 32 // bits
    rows, columns = values.shape
    words = np.zeros((rows // per_word, columns), np.uint64)
    for row in range(rows):
        field = (values[row] % 2**bits).astype(np.uint64) << np.uint64(bits * (row % per_word))
        words[row // per_word] |= field
    return words.astype(np.uint32).view(np.int32)
