"""GPTQ (Frantar et al. 2022): rounds a weight so that its *products* change least, not its numbers.

A layer computes X · Wᵀ for the inputs X of real text. Rounding W to Q adds the error ‖X · (W - Q)ᵀ‖², which per output
is a quadratic form (w - q) · H · (w - q)ᵀ with the Hessian H = Xᵀ · X. It is the same for every output, and inputs that
are large, or that move together, weigh more in it. The columns are rounded one after another; after each, the columns
not yet rounded are moved so that they make up for the error as well as they can:

    error = (w_i - q_i) / U_ii         with H⁻¹ = Uᵀ · U, U upper triangular (Cholesky)
    w_j  -= error · U_ij               for all j > i

U holds what Gaussian elimination of one column after another would compute, so no inverse has to be updated. Columns
are treated in blocks of 32: inside one the update follows each column, the columns behind it follow once a block by
one matrix product, since single columns would read and write the whole weight for each.

Elimination looks ahead only: a column that was rounded early never learns what the later ones could not make up for. So
every column is rounded again, to where the error is least given all others, and so is every scale (coordinate descent).

What layers before have got wrong comes in with the inputs: they are X', and should be X. So it is not W that is
rounded, but the weight whose products with X' are nearest to X · Wᵀ: transposed, it is Wᵀ + H⁻¹ · X'ᵀ · (X - X') · Wᵀ
(GPTAQ, Li et al. 2025).

Columns of large H_ii should come first, while many others can still make up for them. Activation order (`desc_act`)
sorts all columns so, and deals groups out in that order: whoever computes must permute inputs. Without it, groups stay
what they are, neighbours, and only the order in which they, and the columns inside each, are rounded follows H_ii:
that costs nothing later.
"""

import dataclasses
import math

import torch

from folovllm.common.errors import ModelError
from folovllm.worker_proc.quantization.config import WHOLE_INPUT, Scheme
from folovllm.worker_proc.quantization.storage import Quantized

_BLOCK = 32
_PASSES = 2
_SHRINKS = tuple(1.0 - step / 40 for step in range(17))  # scales that are tried: from the full range down to 0.6 of it
_NEGATIVE = tuple(-shrink for shrink in _SHRINKS)
_LARGEST_SCALE = 65504.0  # of float16
_SMALLEST_SCALE = 2.0**-23  # still a number above 0 in float16 after it has shrunk


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to quantize.

    Attributes:
        scheme: bits, group size, symmetric or not.
        desc_act: round columns in the order of their weight in the error, and deal groups out in that order.
        damping: share of the mean of H's diagonal that is added to it, above 0; keeps the inverse from blowing up where
            inputs hardly vary.

    Raises:
        ValueError: the damping is not above 0, or no number: doubling it would never make H invertible.
    """

    scheme: Scheme
    desc_act: bool = False
    damping: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.damping < math.inf:
            raise ValueError(f"damping is {self.damping:g}: it must be a number above 0")


@dataclasses.dataclass(frozen=True)
class Curvature:
    """What the error of a layer's products depends on, float32 [K, K]; X' are its inputs, X what they should be.

    Attributes:
        hessian: X'ᵀ · X'.
        cross: X'ᵀ · X.
    """

    hessian: torch.Tensor
    cross: torch.Tensor


def quantize(weight: torch.Tensor, inputs: Curvature, recipe: Recipe) -> Quantized:
    """Rounds `weight` [N, K] for these inputs.

    Raises:
        ModelError: they hold a number that is not finite.
    """
    if not bool(torch.isfinite(inputs.hessian).all() & torch.isfinite(inputs.cross).all()):
        raise ModelError("the model's activations are not finite: it cannot be quantized")
    work, curvature = weight.float().t().contiguous(), inputs.hessian.clone()
    drift = (inputs.cross - inputs.hessian) @ work
    silent = curvature.diagonal() == 0  # inputs that are always 0: any number does
    curvature.diagonal()[silent] = 1.0
    work[silent] = 0.0
    count = len(work)
    importance = curvature.diagonal().clone()
    size = count if recipe.scheme.group_size == WHOLE_INPUT else recipe.scheme.group_size
    order = torch.argsort(importance, descending=True, stable=True)
    if not recipe.desc_act:
        order = _within_groups(importance, size)
    upper = _cholesky_of_inverse(curvature[order][:, order], recipe.damping)
    ordered = work[order] + upper.t() @ (upper @ drift[order])
    columns = _Columns(ordered.clone(), importance[order], recipe.scheme)
    columns.round_all(upper)
    curvature.diagonal().add_(recipe.damping * importance.mean())
    for _ in range(_PASSES):
        columns.improve(ordered, curvature[order][:, order])
    numbers, groups = torch.empty_like(columns.numbers), torch.empty_like(order)
    numbers[order] = columns.numbers
    zeros, scales = torch.stack(columns.zeros), torch.stack(columns.scales)
    if recipe.desc_act:
        groups[order] = torch.arange(count, device=work.device) // size
    else:
        groups = torch.arange(count, device=work.device) // size
        places = order[::size] // size  # which group came when
        zeros, scales = _put(zeros, places), _put(scales, places)
    return Quantized(numbers, zeros, scales, groups)


def _within_groups(importance: torch.Tensor, size: int) -> torch.Tensor:
    """All inputs: groups of `size` neighbours by their sums of `importance`, those inside each by their own."""
    groups = torch.arange(len(importance), device=importance.device) // size
    sums = torch.zeros(int(groups[-1]) + 1, device=importance.device).index_add_(0, groups, importance)
    if len(importance) % size:
        sums[-1] = -1.0  # the last group is smaller, and only the last to be rounded may be
    inner = torch.argsort(importance, descending=True, stable=True)
    return inner[torch.argsort(sums[groups[inner]], descending=True, stable=True)]


def _put(rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    put = torch.empty_like(rows)
    put[places] = rows
    return put


def round_to_nearest(weight: torch.Tensor, scheme: Scheme) -> Quantized:
    """What GPTQ is compared with: the same grid, every number rounded for itself."""
    work = weight.float().t().contiguous()
    count = len(work)
    columns = _Columns(work, torch.ones(count, device=work.device), scheme)
    columns.round_all(torch.eye(count, device=work.device))
    size = count if scheme.group_size == WHOLE_INPUT else scheme.group_size
    groups = torch.arange(count, device=work.device) // size
    return Quantized(columns.numbers, torch.stack(columns.zeros), torch.stack(columns.scales), groups)


class _Columns:
    """A weight whose columns are rounded from the first to the last.

    It is kept transposed, [K, N]: what is worked on at a time lies together in memory.

    Attributes:
        numbers: uint8 [K, N], filled as columns are rounded.
        zeros, scales: of each group: uint8 [N], float16 [N].
    """

    def __init__(self, work: torch.Tensor, importance: torch.Tensor, scheme: Scheme) -> None:
        """`work`: float32 [K, N], which is changed; `importance`: of each input, in the choice of scales."""
        self._work, self._importance, self._sym = work, importance, scheme.sym
        self._top = 2**scheme.bits - 1
        self._group_size = work.shape[0] if scheme.group_size == WHOLE_INPUT else scheme.group_size
        self.numbers = torch.empty_like(work, dtype=torch.uint8)
        self.zeros: list[torch.Tensor] = []
        self.scales: list[torch.Tensor] = []

    def round_all(self, upper: torch.Tensor) -> None:
        """Rounds all columns; `upper` [K, K] says how the later ones make up for the error of each."""
        work = self._work
        for start in range(0, len(work), _BLOCK):
            end = min(start + _BLOCK, len(work))
            errors = torch.empty_like(work[start:end])
            for column in range(start, end):
                if column % self._group_size == 0:
                    self._begin_group(column, start, errors, upper)
                error = (work[column] - self._rounded(column)) / upper[column, column]
                errors[column - start] = error
                work[column:end].addr_(upper[column, column:end], error, alpha=-1)
            work[end:].addmm_(upper[start:end, end:].t(), errors, alpha=-1)

    def improve(self, exact: torch.Tensor, curvature: torch.Tensor) -> None:
        """Numbers, then scales, are moved to where the error is least given all others as they are by now.

        Args:
            exact: the weight [K, N].
            curvature: H [K, K].
        """
        groups = torch.arange(len(exact), device=exact.device) // self._group_size
        zeros, scales = torch.stack(self.zeros).float()[groups], torch.stack(self.scales).float()[groups]
        pull = curvature @ (exact - (self.numbers.float() - zeros) * scales)  # minus half the error's gradient
        self._improve_numbers(scales, pull, curvature)
        self._improve_scales(zeros, pull, curvature)

    def _improve_numbers(self, scales: torch.Tensor, pull: torch.Tensor, curvature: torch.Tensor) -> None:
        for start in range(0, len(pull), _BLOCK):
            end = min(start + _BLOCK, len(pull))
            moves = torch.empty_like(pull[start:end])
            for column in range(start, end):
                scale, old = scales[column], self.numbers[column].float()
                wanted = old + pull[column] / curvature[column, column] / scale
                new = wanted.round_().clamp_(0, self._top)
                self.numbers[column] = new.to(torch.uint8)
                moves[column - start] = (new - old) * scale
                pull[column:end].addr_(curvature[column:end, column], moves[column - start], alpha=-1)
            pull[:start].addmm_(curvature[:start, start:end], moves, alpha=-1)
            pull[end:].addmm_(curvature[end:, start:end], moves, alpha=-1)

    def _improve_scales(self, zeros: torch.Tensor, pull: torch.Tensor, curvature: torch.Tensor) -> None:
        """One group after another; the error is a parabola in each scale."""
        for group, scale in enumerate(self.scales):
            members = slice(group * self._group_size, (group + 1) * self._group_size)
            steps = self.numbers[members].float() - zeros[members]
            slope = (steps * pull[members]).sum(0)
            bend = (steps * (curvature[members, members] @ steps)).sum(0)
            wanted = scale.float() + slope / bend.clamp_(min=torch.finfo(bend.dtype).tiny)
            usable = torch.isfinite(wanted) & (wanted.abs() >= _SMALLEST_SCALE) & (wanted.abs() <= _LARGEST_SCALE)
            self.scales[group] = torch.where(usable, wanted, scale.float()).half()
            moved = steps * (self.scales[group].float() - scale.float())
            pull.addmm_(curvature[:, members], moved, alpha=-1)

    def _begin_group(self, column: int, start: int, errors: torch.Tensor, upper: torch.Tensor) -> None:
        """Chooses the scales of the group that begins at `column`, for its columns as they are by now.

        Those past the current block have not been moved yet for the block's errors so far.
        """
        end, block_end = min(column + self._group_size, len(self._work)), start + len(errors)
        members = self._work[column:end].clone()
        if end > block_end and column > start:
            behind = upper[start:column, block_end:end].t()
            members[block_end - column :].addmm_(behind, errors[: column - start], alpha=-1)
        zero, scale = self._grid(members, self._importance[column:end])
        self.zeros.append(zero.to(torch.uint8))
        self.scales.append(scale)

    def _rounded(self, column: int) -> torch.Tensor:
        """The column [N] on its group's grid; its numbers are kept."""
        zero, scale = self.zeros[-1].float(), self.scales[-1].float()
        numbers = (self._work[column] / scale + zero).round_().clamp_(0, self._top)
        self.numbers[column] = numbers.to(torch.uint8)
        return (numbers - zero) * scale

    def _grid(self, members: torch.Tensor, importance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Zeros and float16 scales [N] for a group's columns [g, N].

        A range that leaves the outermost numbers out is finer for all others. The one with the least error, weighted
        with the inputs' importance, is taken. A symmetric grid reaches from -8 to 7 scales: where the largest numbers
        are positive, a negative scale serves them better.
        """
        low, high = members.amin(0).clamp(max=0), members.amax(0).clamp(min=0)
        if self._sym:
            high = torch.maximum(-low, high)
            low = -high
        best = torch.full_like(high, torch.inf)
        zeros, scales = torch.zeros_like(high), torch.ones_like(high).half()
        for shrink in (*_SHRINKS, *_NEGATIVE) if self._sym else _SHRINKS:
            scale = ((high - low) / self._top).clamp_(min=_SMALLEST_SCALE).mul_(shrink).half()
            wide = scale.float()
            zero = torch.full_like(wide, (self._top + 1) // 2)
            if not self._sym:
                zero = (-low * shrink / wide).round_().clamp_(0, self._top)
            numbers = (members / wide).add_(zero).round_().clamp_(0, self._top)
            errors = importance @ numbers.sub_(zero).mul_(wide).sub_(members).square_()
            better = errors < best
            best = torch.where(better, errors, best)
            zeros, scales = torch.where(better, zero, zeros), torch.where(better, scale, scales)
        return zeros, scales


def _cholesky_of_inverse(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """U, upper triangular, with Uᵀ · U = (H + damping · mean(diagonal) · 1)⁻¹; more damping where that is singular."""
    mean = hessian.diagonal().mean()
    while True:
        damped = hessian.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper: torch.Tensor
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
        damping *= 2
