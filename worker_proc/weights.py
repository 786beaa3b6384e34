"""Fills a model's tensors: from safetensors files, tensor by tensor, or with random numbers.

Files are memory-mapped and each tensor is copied once, straight to its place in a (possibly fused) parameter, cast and
moved to the device on the way. Every tensor of the model must come exactly once and nothing may be left over: a missing
shard or a foreign tensor ends in an error that names it, never in random or ignored weights.
"""

import pathlib

import msgspec
import safetensors
import torch

from folovllm.common.errors import ModelError
from folovllm.worker_proc.models.registry import CausalLM

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_IGNORED_SUFFIX = "rotary_emb.inv_freq"  # a derived table that old checkpoints store
_STORED_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
_HEADER_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_PACKED = "I32"  # in the header: quantized numbers
_DUMMY_STD = 0.02
_DUMMY_SCALE = _DUMMY_STD / 4.6  # numbers from 0 to 15 spread with a standard deviation of 4.6 around their middle


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def load_weights(model: CausalLM, folder: pathlib.Path) -> None:
    """Copies the checkpoint in `folder` into `model` and brings it into its final layout.

    Raises:
        ModelError: no safetensors file, a shard that the index names is missing, a file is damaged, or a tensor is
            missing, too many, or of the wrong shape or type.
    """
    places = dict(model.checkpoint_tensors())
    spare = model.spare_tensors()
    for path in checkpoint_files(folder):
        _load_file(path, places, spare)
    if places:
        raise ModelError(f"{folder}: {_names(places)} missing from the checkpoint")
    model.finish_loading()


def fill_dummy_weights(model: CausalLM, seed: int) -> None:
    """Random weights for tests and measurements: normal with a standard deviation of 0.02, norms 1.

    The same seed gives the same weights on every device: the numbers are drawn on the CPU in the order of
    `checkpoint_tensors`, in float32.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, place in model.checkpoint_tensors():
        if name.endswith("norm.weight"):
            place.fill_(1.0)
        elif name.endswith(".scales"):
            place.fill_(_DUMMY_SCALE)
        elif place.dtype == torch.int32:  # packed numbers
            place.copy_(torch.randint(-(2**31), 2**31, place.shape, generator=generator))
        else:
            place.copy_(torch.randn(place.shape, generator=generator).mul_(_DUMMY_STD))
    model.finish_loading()


def checkpoint_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The checkpoint's files: model.safetensors, else the shards named by the index.

    Raises:
        ModelError: there are none, or the index names a file that does not exist.
    """
    single, index = folder / _SINGLE_FILE, folder / _INDEX_FILE
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ModelError(f"{folder} has no weights: neither {_SINGLE_FILE} nor {_INDEX_FILE} is there")
    try:
        names = sorted(set(msgspec.json.decode(index.read_bytes(), type=_Index).weight_map.values()))
    except msgspec.DecodeError as error:
        raise ModelError(f"{index}: {error}") from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelError(f"{folder}: shard {', '.join(missing)} is named by {_INDEX_FILE} but does not exist")
    return [folder / name for name in names]


def stored_shapes(folder: pathlib.Path) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the tensors of the checkpoint in `folder`; only headers are read.

    Raises:
        ModelError: as `checkpoint_files`, or a file is damaged.
    """
    found = {}
    for path in checkpoint_files(folder):
        with _open(path) as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                found[name] = tuple(file.get_slice(name).get_shape())
    return found


def checkpoint_dtype(folder: pathlib.Path) -> str | None:
    """Type of the checkpoint's first tensor of floating-point numbers, for a config.json that names none.

    None if it is no usual one, or there is none.
    """
    path = checkpoint_files(folder)[0]
    with _open(path) as file:
        kinds = (file.get_slice(name).get_dtype() for name in sorted(file.keys()))
        return _HEADER_DTYPES.get(next((kind for kind in kinds if kind != _PACKED), ""))


def _open(path: pathlib.Path) -> safetensors.safe_open:
    try:
        return safetensors.safe_open(path, framework="pt", device="cpu")
    except safetensors.SafetensorError as error:
        raise ModelError(f"{path} is damaged or no safetensors file: {error}") from error


def _load_file(path: pathlib.Path, places: dict[str, torch.Tensor], spare: frozenset[str]) -> None:
    """Copies every tensor of one file to its place and removes the place from `places`."""
    with _open(path) as file:
        for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
            if name in places:
                _copy(path, name, file.get_tensor(name), places.pop(name))
            elif name not in spare and not name.endswith(_IGNORED_SUFFIX):
                raise ModelError(f"{path}: tensor {name!r} is not part of this model, or is there twice")


def _copy(path: pathlib.Path, name: str, stored: torch.Tensor, place: torch.Tensor) -> None:
    accepted = {torch.int32: "int32"} if place.dtype == torch.int32 else _STORED_DTYPES
    if stored.dtype not in accepted:
        supported = ", ".join(accepted.values())
        raise ModelError(f"{path}: tensor {name!r} is stored as {stored.dtype}; supported are {supported}")
    if stored.shape != place.shape:
        raise ModelError(
            f"{path}: tensor {name!r} has shape {list(stored.shape)}, but config.json asks for {list(place.shape)}"
        )
    place.copy_(stored)


def _names(places: dict[str, torch.Tensor]) -> str:
    names = sorted(places)
    shown = ", ".join(repr(name) for name in names[:4])
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"tensor{'s' if len(names) > 1 else ''} {shown}{more} {'are' if len(names) > 1 else 'is'}"
