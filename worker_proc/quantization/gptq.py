"""Linear layers of GPTQ checkpoints: which projections are quantized and how, and what they are turned into at load.

The configuration says how each module is stored, and the files show it. Where the two disagree the files count, with a
warning, as long as they can be read in one way only; otherwise the checkpoint is refused.

A layer keeps the checkpoint's tensors until all are filled. Then projections of one input whose inputs are dealt out to
the same groups become one product; others (q, k and v in activation orders of their own) run one after another. Where
there are kernels for 4-bit weights they stay 4-bit; elsewhere (8 bits, float32, odd groups) they are expanded once to
the placement's type: such a model runs as fast as an unquantized one, and takes as much memory.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from folovllm.common.errors import ModelError
from folovllm.common.log import get_logger
from folovllm.worker_proc.device import Placement
from folovllm.worker_proc.layers.blocked import BlockedWeight
from folovllm.worker_proc.layers.linear import Linear, LinearLayer
from folovllm.worker_proc.layers.norm import RMSNorm
from folovllm.worker_proc.layers.side_by_side import SideBySide
from folovllm.worker_proc.quantization.config import SUPPORTED_BITS, WHOLE_INPUT, GPTQConfig, Scheme
from folovllm.worker_proc.quantization.storage import WORD_BITS, Quantized, unpack_rows, unpack_zeros

INT4_BITS = 4

Int4Maker = Callable[[Quantized, torch.Tensor | None], LinearLayer | None]
"""(weight with numbers from 0 to 15, bias) → a layer that keeps it so; None: its sizes or groups are of an odd kind."""

logger = get_logger(__name__)


class GPTQLinears:
    """The maker of a GPTQ checkpoint's linear layers."""

    def __init__(
        self,
        config: GPTQConfig,
        placement: Placement,
        stored: Mapping[str, tuple[int, ...]] | None = None,
        int4_maker: Callable[[], Int4Maker | None] = lambda: None,
    ) -> None:
        """Prepares for a checkpoint.

        Args:
            stored: shapes of the checkpoint's tensors, by name; None where there is none (random weights).
            int4_maker: waits for what makes layers of 4-bit weights; None: nothing does, they are to be expanded.
        """
        self.int4_maker = int4_maker
        self._config = config
        self._placement = placement
        self._stored = stored
        self._warned: set[str] = set()

    def __call__(
        self, prefix: str, in_features: int, parts: Mapping[str, int], /, *, bias: bool = False
    ) -> LinearLayer:
        runs: list[tuple[bool, dict[str, int], list[_Part]]] = []
        for name, size in parts.items():
            scheme = self._scheme(f"{prefix}{name}", in_features)
            if not runs or runs[-1][0] != (scheme is not None):
                runs.append((scheme is not None, {}, []))
            runs[-1][1][name] = size
            if scheme is not None:
                runs[-1][2].append(self._part(prefix, name, in_features, size, scheme, bias))
        layers: list[LinearLayer] = []
        for quantized, sizes, made in runs:
            if quantized:
                layers.append(GPTQLinear(in_features, made, self))
            else:
                layers.append(Linear(in_features, sizes, self._placement, bias=bias))
        return layers[0] if len(layers) == 1 else SideBySide(layers)

    @property
    def placement(self) -> Placement:
        return self._placement

    @property
    def config(self) -> GPTQConfig:
        return self._config

    def warn(self, kind: str, module: str, text: str) -> None:
        """Says once for each kind of contradiction that the files count, with the first module it was seen in."""
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning("GPTQ checkpoint, %s: %s", module, text)

    def _scheme(self, module: str, in_features: int) -> Scheme | None:
        """How the module is stored: the configuration's word, held to the files."""
        scheme = self._config.scheme_of(module)
        if self._stored is None:
            return scheme
        words = self._stored.get(f"{module}.qweight")
        if words is None:
            if scheme is not None and f"{module}.weight" in self._stored:
                self.warn("dense", module, "to be quantized by the configuration, but stored unquantized: taken so")
                return None
            return scheme  # what is missing is named when the files are read
        if scheme is None:
            self.warn("quantized", module, "not to be quantized by the configuration, but stored so: taken so")
            scheme = self._config.scheme
        scheme = self._with_stored_bits(module, scheme, words, in_features)
        return self._with_stored_groups(module, scheme, in_features)

    def _with_stored_bits(self, module: str, scheme: Scheme, shape: Sequence[int], in_features: int) -> Scheme:
        bits = WORD_BITS * shape[0] / in_features if shape else 0.0
        if bits == scheme.bits:
            return scheme
        if bits not in SUPPORTED_BITS:
            raise ModelError(
                f"GPTQ checkpoint: {module}.qweight has shape {list(shape)}, which is {bits:g} bits for "
                f"{in_features} inputs, but the configuration says {scheme.bits}"
            )
        self.warn("bits", module, f"bits are {bits:g} by the shape of qweight, not {scheme.bits}")
        return dataclasses.replace(scheme, bits=int(bits))

    def _with_stored_groups(self, module: str, scheme: Scheme, in_features: int) -> Scheme:
        assert self._stored is not None, "called where there are files"
        scales = self._stored.get(f"{module}.scales")
        count = num_groups(in_features, scheme.group_size)
        if not scales or scales[0] == count:
            return scheme
        found = scales[0]
        if not 0 < found <= in_features or in_features % found:
            raise ModelError(
                f"GPTQ checkpoint: {module}.scales has {found} groups of {in_features} inputs, but the configuration's "
                f"group_size {scheme.group_size} makes {count}"
            )
        size = in_features // found
        self.warn("group_size", module, f"group_size is {size} by the shape of scales, not {scheme.group_size}")
        return dataclasses.replace(scheme, group_size=WHOLE_INPUT if found == 1 else size)

    def _part(self, prefix: str, name: str, in_features: int, size: int, scheme: Scheme, bias: bool) -> "_Part":
        module, per_word = f"{prefix}{name}", WORD_BITS // scheme.bits
        for what, number in (("inputs", in_features), ("outputs", size)):
            if number % per_word:
                raise ModelError(f"GPTQ checkpoint: {module} has {number} {what}, no multiple of {per_word}")
        groups = num_groups(in_features, scheme.group_size)
        # Only the numbers go to a GPU as they are stored. What is small is checked first, on the CPU: on a GPU each of
        # the dozen questions asked of every module would wait for the device.
        tensors = {
            "qweight": torch.empty(in_features // per_word, size, dtype=torch.int32, device=self._placement.device),
            "scales": torch.empty(groups, size, dtype=torch.float32),
        }
        if self._stored is not None or not scheme.sym:
            tensors["qzeros"] = torch.empty(groups, size // per_word, dtype=torch.int32)
        if self._stored is not None and f"{module}.g_idx" in self._stored:
            tensors["g_idx"] = torch.empty(in_features, dtype=torch.int32)
        elif self._stored is not None and self._config.desc_act and groups > 1:
            raise ModelError(f"GPTQ checkpoint: desc_act is set, but there is no {module}.g_idx to say the order")
        if bias or (self._stored is not None and f"{module}.bias" in self._stored):
            tensors["bias"] = torch.empty(size, dtype=self._placement.dtype)
        return _Part(module, in_features, size, scheme, tensors, bias)


@dataclasses.dataclass
class _Part:
    """One projection's tensors, as stored.

    Attributes:
        module: its full name.
        tensors: by the last word of their names; `qzeros`, `g_idx` and `bias` may be absent.
        has_bias: whether the network has a bias here; AutoGPTQ also stores zeros as bias where it has none.
    """

    module: str
    in_features: int
    size: int
    scheme: Scheme
    tensors: dict[str, torch.Tensor]
    has_bias: bool

    def quantized(self, maker: GPTQLinears) -> Quantized:
        """The weight's numbers, checked. Raises ModelError where they make no sense."""
        scheme, tensors = self.scheme, self.tensors
        count = num_groups(self.in_features, scheme.group_size)
        groups = torch.arange(self.in_features) // _inputs(scheme.group_size, self.in_features)
        if "g_idx" in tensors:
            given = tensors["g_idx"].to(torch.int64)
            if int(given.min()) < 0 or int(given.max()) >= count:
                raise ModelError(
                    f"GPTQ checkpoint: {self.module}.g_idx names groups {int(given.min())} to {int(given.max())}, "
                    f"but there are {count}"
                )
            if not maker.config.desc_act and not torch.equal(given, groups):
                maker.warn("desc_act", self.module, "g_idx deals inputs out to groups in another order: desc_act is so")
            groups = given
        if not bool(torch.isfinite(tensors["scales"]).all()):
            raise ModelError(f"GPTQ checkpoint: {self.module}.scales holds a number that is not finite")
        return Quantized(unpack_rows(tensors["qweight"], scheme.bits), self._zeros(maker), tensors["scales"], groups)

    def _zeros(self, maker: GPTQLinears) -> torch.Tensor:
        """uint8 [G, N]; a format that contradicts symmetric zeros is corrected."""
        bits, middle = self.scheme.bits, 2 ** (self.scheme.bits - 1)
        if "qzeros" not in self.tensors:
            return torch.full_like(self.tensors["scales"], middle, dtype=torch.uint8)
        words, config = self.tensors["qzeros"], maker.config
        zeros = unpack_zeros(words, bits, minus_one=config.zeros_minus_one, borrows=config.borrows)
        if bool((zeros == middle).all()):
            return zeros
        others = unpack_zeros(words, bits, minus_one=not config.zeros_minus_one)
        if bool((others == middle).all()):
            says, is_so = ("gptq", "gptq_v2") if config.zeros_minus_one else ("gptq_v2", "gptq")
            maker.warn("format", self.module, f"the format is {is_so} by its symmetric zeros, not {says}")
            return others
        if self.scheme.sym:
            maker.warn("sym", self.module, "zeros are not all in the middle, though sym is set: taken as they are")
        return zeros

    def bias(self) -> torch.Tensor | None:
        stored = self.tensors.get("bias")
        if stored is None or self.has_bias:
            return stored
        if bool(stored.any()):
            raise ModelError(f"GPTQ checkpoint: {self.module}.bias is not zero, but this network has no bias there")
        return None


class GPTQLinear:
    """Projections of one input, from a GPTQ checkpoint."""

    def __init__(self, in_features: int, parts: Sequence[_Part], maker: GPTQLinears) -> None:
        self._in_features = in_features
        self._parts = list(parts)
        self._maker = maker
        self._layer: LinearLayer | None = None

    @property
    def blocked(self) -> BlockedWeight | None:
        """See `layers.linear.LinearLayer`."""
        return self.layer.blocked

    @property
    def bias(self) -> torch.Tensor | None:
        """See `layers.linear.LinearLayer`."""
        return self.layer.bias

    @property
    def num_bytes(self) -> int:
        """See `layers.linear.LinearLayer`."""
        return self.layer.num_bytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, in_features] → [T, out_features]."""
        return self.layer(x)

    def of_normed(self, hidden: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """The product of the normed `hidden` [T, in_features]."""
        return self.layer.of_normed(hidden, norm)

    def gated(self, hidden: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """`silu(gate) · up` of the normed `hidden`: [T, out_features / 2]."""
        return self.layer.gated(hidden, norm)

    def add_to(self, hidden: torch.Tensor, x: torch.Tensor) -> None:
        """Adds the product of `x` [T, in_features] to `hidden` [T, out_features], in place."""
        self.layer.add_to(hidden, x)

    @property
    def layer(self) -> LinearLayer:
        """What computes, once it is packed."""
        assert self._layer is not None, "pack() comes before the first product"
        return self._layer

    def checkpoint_tensors(self, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Where each of the checkpoint's tensors goes."""
        for part in self._parts:
            name = part.module.rpartition(".")[2]
            yield from ((f"{prefix}{name}.{kind}", tensor) for kind, tensor in part.tensors.items())

    def pack(self) -> None:
        """Turns the stored tensors into what computes fastest, and lets go of them."""
        layers: list[LinearLayer] = []
        together: list[tuple[_Part, Quantized]] = []
        for part in self._parts:
            read = part, part.quantized(self._maker)
            if together and not _one_product(together[-1], read):
                layers.append(self._built(together))
                together = []
            together.append(read)
        layers.append(self._built(together))
        self._layer = layers[0] if len(layers) == 1 else SideBySide(layers)
        self._parts = []

    def _built(self, parts: Sequence[tuple[_Part, Quantized]]) -> LinearLayer:
        quantized = _joined([weight for _, weight in parts])
        biases = [part.bias() for part, _ in parts]
        present = [each for each in biases if each is not None]
        bias = torch.cat(present).to(self._maker.placement.device) if present else None
        if parts[0][0].scheme.bits == INT4_BITS and (make := self._maker.int4_maker()) is not None:
            layer = make(quantized, bias)
            if layer is not None:
                return layer
            self._maker.warn(
                "expanded", parts[0][0].module, "no kernel takes these sizes or groups: weights are expanded"
            )
        return _expanded(quantized, bias, {part.module: part.size for part, _ in parts}, self._maker.placement)


def num_groups(in_features: int, group_size: int) -> int:
    """Groups of an input; the last may be smaller."""
    return -(-in_features // _inputs(group_size, in_features))


def _inputs(group_size: int, in_features: int) -> int:
    return in_features if group_size == WHOLE_INPUT else group_size


def _one_product(left: tuple[_Part, Quantized], right: tuple[_Part, Quantized]) -> bool:
    same_kind = left[0].scheme.bits == right[0].scheme.bits and left[1].scales.shape[0] == right[1].scales.shape[0]
    return same_kind and torch.equal(left[1].groups, right[1].groups)


def _joined(weights: Sequence[Quantized]) -> Quantized:
    if len(weights) == 1:
        return weights[0]
    return Quantized(
        torch.cat([weight.numbers for weight in weights], 1),
        torch.cat([weight.zeros for weight in weights], 1),
        torch.cat([weight.scales for weight in weights], 1),
        weights[0].groups,
    )


def _expanded(
    quantized: Quantized, bias: torch.Tensor | None, parts: Mapping[str, int], placement: Placement
) -> Linear:
    """The weight in the placement's type, as an unquantized layer."""
    layer = Linear(quantized.numbers.shape[0], parts, placement, bias=bias is not None)
    layer.weight.copy_(quantized.dequantize())
    if layer.bias is not None and bias is not None:
        layer.bias.copy_(bias)
    layer.pack()
    return layer
