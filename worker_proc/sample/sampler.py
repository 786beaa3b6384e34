"""Sampling as a pure function: logits, parameters, seed, sample index and position in; one token id per row out.

For each row, in this order:
1. Temperature: z = (logit - largest logit) / temperature. Greedy rows (temperature below 1e-5, or top_k 1) take the
   lowest id of the largest logit and end here.
2. top_k: the k largest z stay.
3. top_p: of these, renormalised, the largest stay until their sum reaches p; at least one.
4. min_p: of these, those stay whose probability is at least min_p times the largest.
5. Draw: the token at which the cumulated probability, *in order of ids*, first exceeds a uniform number.
Where equal z meet a boundary of 2 or 3, the lowest ids stay. The order of the filters is that of transformers.

A row's result does not depend on the other rows: nothing is reduced across rows, and within a row sums are cumulated
from left to right in float64, so that it makes no difference from how many candidates the row is computed.

Cost: rows without a filter need no sort. For rows with one, the largest 128 z decide mostly, the largest 1,024 nearly
always; only where these do not (a nucleus that is wider, that many equal values) the row is sorted whole.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch

from folovllm.common.sampling_params import GREEDY_TEMPERATURE
from folovllm.worker_proc.sample.random import uniform

_CANDIDATES = (128, 1024)
_LOWEST = torch.finfo(torch.float32).min


@dataclasses.dataclass(frozen=True, slots=True)
class SamplingTensors:
    """Parameters of R rows, on the logits' device.

    Attributes:
        temperature: [R] float32.
        top_k: [R] int64; 0 switches it off.
        top_p: [R] float64 in (0, 1]; 1 switches it off.
        min_p: [R] float32 in [0, 1]; 0 switches it off.
        seed: [R] int64.
        sample_index: [R] int64; which of the request's answers.
        position: [R] int64; which output token of the answer this is, from 0. A request that comes back after
            preemption goes on counting where it was.
        plain_rows: [N] int64; rows that draw without a filter, or None if there is none.
        filtered_rows: [M] int64; rows that draw with one, or None. Rows in neither are greedy.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seed: torch.Tensor
    sample_index: torch.Tensor
    position: torch.Tensor
    plain_rows: torch.Tensor | None
    filtered_rows: torch.Tensor | None

    def select(self, rows: torch.Tensor) -> "SamplingTensors":
        """The parameters of some rows, in their order."""
        return SamplingTensors(
            temperature=self.temperature[rows],
            top_k=self.top_k[rows],
            top_p=self.top_p[rows],
            min_p=self.min_p[rows],
            seed=self.seed[rows],
            sample_index=self.sample_index[rows],
            position=self.position[rows],
            plain_rows=None,
            filtered_rows=None,
        )


def is_greedy(temperature: float, top_k: int) -> bool:
    """Whether these parameters always give the most probable token."""
    return temperature < GREEDY_TEMPERATURE or top_k == 1


def has_filter(top_k: int, top_p: float, min_p: float) -> bool:
    """Whether these parameters cut anything off the distribution."""
    return top_k > 0 or top_p < 1.0 or min_p > 0.0


def split_rows(
    temperature: Sequence[float], top_k: Sequence[int], top_p: Sequence[float], min_p: Sequence[float]
) -> tuple[list[int], list[int]]:
    """(plain rows, filtered rows) of a batch, from the host's numbers; see SamplingTensors."""
    plain: list[int] = []
    filtered: list[int] = []
    for row, (t, k, p, m) in enumerate(zip(temperature, top_k, top_p, min_p, strict=True)):
        if not is_greedy(t, k):
            (filtered if has_filter(k, p, m) else plain).append(row)
    return plain, filtered


class Sampled(NamedTuple):
    """What was drawn.

    Attributes:
        token_ids: [R] int64, below V.
        is_void: [R] bool; rows whose largest logit is no finite number: constraints left no token, or the network
            overflowed. Their token means nothing.
    """

    token_ids: torch.Tensor
    is_void: torch.Tensor


def sample(logits: torch.Tensor, params: SamplingTensors) -> Sampled:
    """Draws one token for each row.

    Args:
        logits: [R, V] float32, already cut to the ids the tokenizer knows; not changed.
        params: of the R rows.
    """
    tokens = logits.argmax(dim=-1)  # takes a NaN for the largest
    is_void = ~logits.gather(1, tokens[:, None])[:, 0].isfinite()
    for rows, draw in ((params.plain_rows, _draw_plain), (params.filtered_rows, _draw_filtered)):
        if rows is not None:
            tokens.index_copy_(0, rows, draw(logits, rows, params))
    return Sampled(tokens, is_void)


def _draw_plain(logits: torch.Tensor, rows: torch.Tensor, params: SamplingTensors) -> torch.Tensor:
    chosen = params.select(rows)
    weights = _scaled(logits[rows], chosen.temperature).exp_()
    return _inverse_cdf(weights, _uniform(chosen))


def _draw_filtered(logits: torch.Tensor, rows: torch.Tensor, params: SamplingTensors) -> torch.Tensor:
    chosen = params.select(rows)
    z = _scaled(logits[rows], chosen.temperature)
    # On CUDA a whole sort is cheap, and asking whether the candidates suffice would wait for the device.
    sizes = [size for size in _CANDIDATES if size < z.shape[1]] if z.device.type == "cpu" else []
    tokens = torch.empty_like(rows)
    pending = torch.arange(rows.shape[0], device=rows.device)
    for size in sizes:
        drawn, decided = _draw_candidates(z, chosen, size)
        tokens[pending[decided]] = drawn[decided]
        undecided = (~decided).nonzero().flatten()
        if undecided.numel() == 0:
            return tokens
        pending, z, chosen = pending[undecided], z[undecided], chosen.select(undecided)
    tokens[pending] = _draw_sorted(z, chosen)
    return tokens


def _draw_candidates(z: torch.Tensor, params: SamplingTensors, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [R] drawn from the `size` largest z of each row, and whether these settle the row [R]."""
    largest, ids = z.topk(size)
    num_kept = _num_kept(largest, _total(z), z.shape[1], params)
    threshold = largest.gather(1, num_kept[:, None] - 1)
    # All values equal to the threshold must be among the candidates, else the lowest ids of them are not known; and so
    # must all top_k values, else the sum that top_p is a share of is not known.
    decided = (largest[:, -1] < threshold[:, 0]) & ((params.top_k <= size) | (params.top_k >= z.shape[1]))
    ids, order = ids.sort(dim=-1)
    weights = _kept_weights(largest.gather(1, order), largest, num_kept, threshold)
    picked = _inverse_cdf(weights, _uniform(params))
    return ids.gather(1, picked[:, None])[:, 0], decided


def _draw_sorted(z: torch.Tensor, params: SamplingTensors) -> torch.Tensor:
    """Tokens [R] of rows that are sorted whole."""
    descending = z.sort(dim=-1, descending=True).values
    num_kept = _num_kept(descending, _total(z), z.shape[1], params)
    threshold = descending.gather(1, num_kept[:, None] - 1)
    return _inverse_cdf(_kept_weights(z, descending, num_kept, threshold), _uniform(params))


def _scaled(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """z [R, V] ≤ 0. The largest logit is taken away first: dividing first could overflow for small temperatures."""
    largest = logits.amax(dim=-1, keepdim=True).clamp_min(_LOWEST)  # a row of -inf must not give -inf - -inf
    return (logits - largest).div_(temperature[:, None])


def _total(z: torch.Tensor) -> torch.Tensor:
    """Sum of all weights of each row, float64 [R], added from left to right."""
    return z.exp().cumsum(dim=-1, dtype=torch.float64)[:, -1]


def _num_kept(descending: torch.Tensor, total: torch.Tensor, num_columns: int, params: SamplingTensors) -> torch.Tensor:
    """How many of the largest z stay, int64 [R], 1 to K, as far as `descending` [R, K] shows.

    Where the answer is K and K is smaller than the row, more might stay: `_draw_candidates` finds out by the threshold.
    """
    num_candidates = descending.shape[1]
    weights = descending.exp()
    cumulated = weights.cumsum(dim=-1, dtype=torch.float64)
    top_k = torch.where(params.top_k > 0, params.top_k, num_columns)
    kept = top_k.clamp(max=num_candidates)
    mass = torch.where(top_k < num_columns, cumulated.gather(1, kept[:, None] - 1)[:, 0], total)
    before = cumulated - weights
    in_nucleus = (before < (params.top_p * mass)[:, None]).sum(dim=-1)
    kept = torch.where(params.top_p < 1.0, torch.minimum(kept, in_nucleus), kept)
    probable = (weights >= params.min_p[:, None]).sum(dim=-1)  # the largest weight is 1
    return torch.minimum(kept, probable).clamp_(min=1)


def _kept_weights(
    z: torch.Tensor, descending: torch.Tensor, num_kept: torch.Tensor, threshold: torch.Tensor
) -> torch.Tensor:
    """Weights of `z` [R, N], whose columns are in order of ids; 0 for what is filtered."""
    num_above = (descending > threshold).sum(dim=-1)
    ties = z == threshold
    rank = ties.cumsum(dim=-1, dtype=torch.int32)
    keep = (z > threshold) | (ties & (rank <= (num_kept - num_above)[:, None]))
    return z.exp().mul_(keep)


def _uniform(params: SamplingTensors) -> torch.Tensor:
    return uniform(params.seed, params.sample_index, params.position)


def _inverse_cdf(weights: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """The first column at which the cumulated weights exceed `number` [R] times their sum, int64 [R]."""
    cumulated = weights.cumsum(dim=-1, dtype=torch.float64)
    total = cumulated[:, -1]
    # The product may round up to the sum; staying below it makes the last column with a weight the furthest choice.
    target = torch.minimum(number * total, torch.nextafter(total, torch.zeros_like(total)))
    picked = torch.searchsorted(cumulated, target[:, None], right=True)[:, 0]
    return picked.clamp_(max=weights.shape[1] - 1)
