"""What a GPTQ checkpoint says about itself, checked: `quantization_config` of config.json, or quantize_config.json.

Three programs have written such fields, under names of their own: AutoGPTQ, optimum (transformers) and GPTQModel. What
decides how the numbers are read is checked here and refused by name where it is not supported; what only told the
quantizer how to work (damping, data sets, batch sizes) says nothing about the file and is passed over.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from folovllm.common.errors import ModelError

SUPPORTED_BITS = (4, 8)
WHOLE_INPUT = -1  # group size: one scale for a whole row of the weight
_FORMATS = ("gptq", "gptq_v2")
_DEFAULT_FORMAT = "gptq"
_SMALLEST_GROUP, _LARGEST_GROUP = 16, 1024
_WORD_BITS = 32


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How one module's weight is quantized.

    Attributes:
        bits: of a number, 4 or 8.
        group_size: inputs that share a scale and a zero; -1 for all.
        sym: whether every zero is the middle of the range.
    """

    bits: int
    group_size: int
    sym: bool


@dataclasses.dataclass(frozen=True)
class Rule:
    """An exception for the modules whose full name `pattern` matches from its beginning: None leaves them dense."""

    pattern: re.Pattern[str]
    scheme: Scheme | None


@dataclasses.dataclass(frozen=True)
class GPTQConfig:
    """A checkpoint's quantization.

    Attributes:
        scheme: of every quantized module that no rule names.
        desc_act: inputs may be dealt out to groups in any order (`g_idx`), as GPTQ's activation order leaves them.
        zeros_minus_one: format `gptq` stores zeros minus one, `gptq_v2` as they are.
        borrows: the one was taken off eight zeros at a time, as one 32-bit number (GPTQModel), not off each.
        rules: exceptions, the first that matches counts.
        modules: endings of the names of quantized modules; None for all linear layers inside the decoder layers.
        lm_head: whether the head is quantized, too.
    """

    scheme: Scheme
    desc_act: bool
    zeros_minus_one: bool
    borrows: bool
    rules: tuple[Rule, ...] = ()
    modules: tuple[str, ...] | None = None
    lm_head: bool = False

    def scheme_of(self, module: str) -> Scheme | None:
        """How the module of that full name is quantized; None if it is not."""
        for rule in self.rules:
            if rule.pattern.match(module):
                return rule.scheme
        if module == "lm_head":
            return self.scheme if self.lm_head else None
        if self.modules is not None and not any(f".{module}".endswith(f".{ending}") for ending in self.modules):
            return None
        return self.scheme


class _Raw(msgspec.Struct, kw_only=True):
    """The fields that say how a checkpoint is to be read, as spelled by all three programs."""

    bits: int
    group_size: int
    sym: bool = True
    desc_act: bool = False
    checkpoint_format: str | None = None
    format: str | None = None
    is_marlin_format: bool = False
    pack_dtype: str = "int32"
    lm_head: bool = False
    dynamic: dict[str, dict[str, Any]] | None = None
    modules_in_block_to_quantize: list[str | list[str]] | None = None
    meta: dict[str, Any] | None = None
    activation: Any = None
    rotation: Any = None
    adapter: Any = None


class _Override(msgspec.Struct, kw_only=True):
    bits: int | None = None
    group_size: int | None = None
    sym: bool | None = None
    pack_dtype: str = "int32"


def read_gptq_config(fields: Mapping[str, Any]) -> GPTQConfig:
    """Checks the fields of a GPTQ checkpoint's configuration.

    Raises:
        ModelError: a field is missing or of the wrong type, or asks for something that is not supported.
    """
    try:
        raw = msgspec.convert(dict(fields), _Raw)
    except msgspec.ValidationError as error:
        raise ModelError(f"GPTQ configuration: {error}") from error
    _refuse_unsupported(raw)
    scheme = _checked(Scheme(raw.bits, raw.group_size, raw.sym), "")
    written_by = str((raw.meta or {}).get("quantizer", "")).lower()
    return GPTQConfig(
        scheme=scheme,
        desc_act=raw.desc_act,
        zeros_minus_one=_format(raw) == "gptq",
        borrows="gptqmodel" in written_by,
        rules=tuple(_rule(pattern, changes, scheme) for pattern, changes in (raw.dynamic or {}).items()),
        modules=_endings(raw.modules_in_block_to_quantize),
        lm_head=raw.lm_head,
    )


def _format(raw: _Raw) -> str:
    return raw.checkpoint_format or raw.format or _DEFAULT_FORMAT


def _refuse_unsupported(raw: _Raw) -> None:
    stored = "marlin" if raw.is_marlin_format else _format(raw)
    if stored not in _FORMATS:
        raise ModelError(f"GPTQ checkpoint_format {stored!r} is not supported; supported are {', '.join(_FORMATS)}")
    if raw.pack_dtype != "int32":
        raise ModelError(f"GPTQ pack_dtype {raw.pack_dtype!r} is not supported; supported is 'int32'")
    for name, value in (("activation", raw.activation), ("rotation", raw.rotation), ("adapter", raw.adapter)):
        if value:
            raise ModelError(f"GPTQ {name} {value!r} is not supported; supported are plain 4-bit and 8-bit weights")


def _checked(scheme: Scheme, where: str) -> Scheme:
    if scheme.bits not in SUPPORTED_BITS:
        raise ModelError(f"GPTQ with {scheme.bits} bits{where} is not supported; supported are 4 and 8")
    size = scheme.group_size
    if size != WHOLE_INPUT and not _SMALLEST_GROUP <= size <= _LARGEST_GROUP:
        raise ModelError(
            f"GPTQ group_size {size}{where} is not supported; supported are {_SMALLEST_GROUP} to {_LARGEST_GROUP}, "
            f"and {WHOLE_INPUT} for the whole input"
        )
    if size % (_WORD_BITS // scheme.bits) and size != WHOLE_INPUT:
        raise ModelError(f"GPTQ group_size {size}{where} is no multiple of {_WORD_BITS // scheme.bits}")
    return scheme


def _rule(pattern: str, changes: dict[str, Any], scheme: Scheme) -> Rule:
    """`-:pattern` leaves modules as they are; `+:pattern`, or the bare pattern, changes their numbers."""
    where = f" for {pattern!r}"
    try:
        compiled = re.compile(pattern.removeprefix("-:").removeprefix("+:"))
        override = msgspec.convert(changes, _Override)
    except (re.error, msgspec.ValidationError) as error:
        raise ModelError(f"GPTQ dynamic rule {pattern!r}: {error}") from error
    if pattern.startswith("-:"):
        return Rule(compiled, None)
    if override.pack_dtype != "int32":
        raise ModelError(f"GPTQ pack_dtype {override.pack_dtype!r}{where} is not supported; supported is 'int32'")
    changed = Scheme(
        scheme.bits if override.bits is None else override.bits,
        scheme.group_size if override.group_size is None else override.group_size,
        scheme.sym if override.sym is None else override.sym,
    )
    return Rule(compiled, _checked(changed, where))


def _endings(given: list[str | list[str]] | None) -> tuple[str, ...] | None:
    if given is None:
        return None
    return tuple(name for entry in given for name in ([entry] if isinstance(entry, str) else entry))
