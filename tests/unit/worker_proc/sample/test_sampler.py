"""The sampler against a plain reference: Python lists, one row at a time, a whole sort, no shortcuts."""

import itertools
import math
from typing import NamedTuple

import pytest
import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from folovllm.worker_proc.sample.random import uniform
from folovllm.worker_proc.sample.sampler import SamplingTensors, has_filter, is_greedy, sample, split_rows


class Row(NamedTuple):
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    sample_index: int = 0
    position: int = 0


def tensors(rows: list[Row]) -> SamplingTensors:
    columns = list(zip(*rows, strict=True))
    plain, filtered = split_rows(
        [row.temperature for row in rows],
        [row.top_k for row in rows],
        [row.top_p for row in rows],
        [row.min_p for row in rows],
    )
    return SamplingTensors(
        temperature=torch.tensor(columns[0], dtype=torch.float32),
        top_k=torch.tensor(columns[1], dtype=torch.int64),
        top_p=torch.tensor(columns[2], dtype=torch.float64),
        min_p=torch.tensor(columns[3], dtype=torch.float32),
        seed=torch.tensor(columns[4], dtype=torch.int64),
        sample_index=torch.tensor(columns[5], dtype=torch.int64),
        position=torch.tensor(columns[6], dtype=torch.int64),
        plain_rows=torch.tensor(plain) if plain else None,
        filtered_rows=torch.tensor(filtered) if filtered else None,
    )


def draw(logits: torch.Tensor, *rows: Row) -> list[int]:
    drawn: list[int] = sample(logits, tensors(list(rows))).token_ids.tolist()
    return drawn


def kept_by_reference(weights: list[float], row: Row) -> list[int]:
    """Ids that pass the filters, by definition; weights are relative to the largest."""
    order = sorted(range(len(weights)), key=lambda token: (-weights[token], token))
    if row.top_k:
        order = order[: row.top_k]
    mass = math.fsum(weights[token] for token in order)
    nucleus: list[int] = []
    before = 0.0
    for token in order:
        if row.top_p < 1.0 and nucleus and before >= row.top_p * mass:
            break
        nucleus.append(token)
        before += weights[token]
    limit = torch.tensor(row.min_p, dtype=torch.float32).item()
    return sorted(token for token in nucleus if weights[token] >= limit) or order[:1]


def reference(logits: torch.Tensor, row: Row) -> int:
    if is_greedy(row.temperature, row.top_k):
        return max(range(len(logits)), key=lambda token: (logits[token].item(), -token))
    weights = ((logits - logits.max()) / torch.tensor(row.temperature)).exp().tolist()
    kept = kept_by_reference(weights, row)
    number = uniform(*(torch.tensor([value]) for value in (row.seed, row.sample_index, row.position))).item()
    target = number * sum(weights[token] for token in kept)
    for token, cumulated in zip(kept, itertools.accumulate(weights[token] for token in kept), strict=True):
        if cumulated > target:
            return token
    return kept[-1]


def random_logits(rows: int, columns: int, *, rounded: bool = False, scale: float = 2.0, seed: int = 0) -> torch.Tensor:
    logits = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale
    return logits.round() if rounded else logits  # rounding to whole numbers makes many ties


FILTERS = [
    Row(),
    Row(top_k=2),
    Row(top_k=50),
    Row(top_k=5000),
    Row(top_p=0.9),
    Row(top_p=0.3),
    Row(top_p=1e-9),
    Row(min_p=0.1),
    Row(min_p=1.0),
    Row(top_k=30, top_p=0.8),
    Row(top_k=1500, top_p=0.7),
    Row(top_k=40, top_p=0.95, min_p=0.05, temperature=0.7),
    Row(temperature=3.0, top_p=0.99),
    Row(temperature=0.01, top_p=0.5),
]


@pytest.mark.parametrize("columns", [7, 300, 3000])
@pytest.mark.parametrize("rounded", [False, True])
def test_equals_the_reference(columns: int, rounded: bool) -> None:
    rows = [filters._replace(seed=seed, position=3) for filters in FILTERS for seed in range(6)]
    logits = random_logits(len(rows), columns, rounded=rounded)
    expected = [reference(row_logits, row) for row_logits, row in zip(logits, rows, strict=True)]
    assert draw(logits, *rows) == expected


@pytest.mark.parametrize("scale", [0.001, 8.0])
def test_flat_and_peaked_rows_equal_the_reference(scale: float) -> None:
    rows = [filters._replace(seed=seed) for filters in FILTERS for seed in range(2)]
    logits = random_logits(len(rows), 2500, scale=scale)
    assert draw(logits, *rows) == [reference(one, row) for one, row in zip(logits, rows, strict=True)]


def test_ties_at_a_boundary_keep_the_lowest_ids() -> None:
    logits = torch.zeros(400, 2000)
    logits[:, 1000] = 1e-3
    rows = [Row(top_k=3, seed=seed) for seed in range(400)]
    assert set(draw(logits, *rows)) == {0, 1, 1000}
    nucleus = [Row(top_p=2.5 / 2000, seed=seed) for seed in range(400)]
    assert set(draw(logits, *nucleus)) == {0, 1, 1000}


def distribution(logits: torch.Tensor, row: Row) -> torch.Tensor:
    """Probabilities [V] in float64 that transformers draws from."""
    warpers = [TemperatureLogitsWarper(row.temperature)]
    warpers += [TopKLogitsWarper(row.top_k)] if row.top_k else []
    warpers += [TopPLogitsWarper(row.top_p)] if row.top_p < 1 else []
    warpers += [MinPLogitsWarper(row.min_p)] if row.min_p else []
    scores = logits.double()[None]
    for warper in warpers:
        scores = warper(torch.zeros(1, 1, dtype=torch.int64), scores)
    return scores[0].softmax(-1)


def chi_square_bound(degrees: int) -> float:
    """What the statistic exceeds once in 1,000 times if all is right (Wilson and Hilferty's approximation)."""
    spread = 2 / (9 * degrees)
    return float(degrees * (1 - spread + 3.09 * math.sqrt(spread)) ** 3)


@pytest.mark.parametrize("varied", ["position", "seed", "sample_index"])
@pytest.mark.parametrize(
    "row",
    [
        Row(),
        Row(temperature=0.6),
        Row(temperature=1.7),
        Row(top_k=10),
        Row(top_p=0.8),
        Row(min_p=0.1),
        Row(temperature=1.3, top_k=30, top_p=0.9, min_p=0.02),
    ],
)
def test_L09_draws_follow_the_distribution_that_transformers_draws_from(row: Row, varied: str) -> None:
    """20,000 draws, each from a number of its own, and of one request, seed or answer after another."""
    count, num_columns = 20_000, 60
    logits = torch.randn(num_columns, generator=torch.Generator().manual_seed(8)) * 1.5
    rows = [row._replace(**{varied: number}) for number in range(count)]
    found = torch.bincount(torch.tensor(draw(logits.expand(count, num_columns), *rows)), minlength=num_columns)
    expected = distribution(logits, row) * count
    assert not found[expected == 0].any(), "a filtered token was drawn"
    common = expected >= 5
    # Rarer tokens are counted together.
    rare_found, rare = float(found[~common].sum()), float(expected[~common].sum())
    statistic = float(((found[common] - expected[common]) ** 2 / expected[common]).sum())
    statistic += (rare_found - rare) ** 2 / rare if rare >= 5 else 0.0
    assert statistic < chi_square_bound(int(common.sum()) - 1 + (rare >= 5))


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-30, 9e-6])
def test_L10_tiny_temperatures_are_greedy_and_leave_the_neighbour_alone(temperature: float) -> None:
    logits = random_logits(2, 500, scale=30.0)
    logits[0, [70, 90]] = logits[0].max() + 1
    neighbour = Row(seed=11, position=2)
    alone = draw(logits[1:], neighbour)
    assert draw(logits, Row(temperature=temperature), neighbour) == [70, *alone]
    assert draw(logits, Row(temperature=temperature, top_k=5, top_p=0.5), neighbour) == [70, *alone]


def test_L10_temperatures_just_above_greedy_never_overflow() -> None:
    logits = random_logits(4, 500, scale=1e30)
    rows = [Row(temperature=1e-5), Row(temperature=1e-5, top_p=0.9), Row(temperature=2e-5, top_k=9), Row(min_p=0.2)]
    assert draw(logits, *rows) == logits.argmax(dim=-1).tolist()


def test_top_k_1_is_the_argmax_with_the_lowest_id() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0]] * 8)
    assert draw(logits, *[Row(top_k=1, temperature=2.0, seed=seed) for seed in range(8)]) == [1] * 8


def test_top_p_keeps_at_least_one_token() -> None:
    logits = random_logits(20, 3000)
    assert draw(logits, *[Row(top_p=1e-12, seed=seed) for seed in range(20)]) == logits.argmax(dim=-1).tolist()


def test_L09_a_row_does_not_depend_on_its_neighbours() -> None:
    rows = [filters._replace(seed=seed) for seed, filters in enumerate(FILTERS * 3)]
    rows[4] = Row(temperature=0.0)
    logits = random_logits(len(rows), 3000)
    together = draw(logits, *rows)
    alone = [draw(logits[index : index + 1], row)[0] for index, row in enumerate(rows)]
    reversed_order = draw(logits.flip(0), *reversed(rows))[::-1]
    assert together == alone == reversed_order


def test_L09_seed_sample_index_and_position_all_count() -> None:
    logits = torch.zeros(1, 100_000)
    base = Row(seed=7)
    drawn = [
        draw(logits, row)[0] for row in (base, base._replace(sample_index=1), base._replace(position=1), Row(seed=8))
    ]
    assert len(set(drawn)) == 4
    assert draw(logits, base) == drawn[:1]


@pytest.mark.parametrize("filters", [Row(), Row(top_k=5), Row(top_p=0.9), Row(min_p=0.01)])
def test_forbidden_tokens_are_never_drawn(filters: Row) -> None:
    logits = torch.full((200, 1500), -math.inf)
    logits[:, [3, 700, 1499]] = 0.0
    tokens = draw(logits, *[filters._replace(seed=seed) for seed in range(200)])
    assert set(tokens) == {3, 700, 1499}


def test_a_row_without_any_token_gives_a_void_id_in_range_and_harms_no_other() -> None:
    logits = random_logits(3, 1500)
    logits[1] = -math.inf
    rows = [Row(seed=1), Row(seed=2), Row(seed=3, top_k=7)]
    tokens = draw(logits, *rows)
    assert 0 <= tokens[1] < 1500
    assert [tokens[0], tokens[2]] == [draw(logits[:1], rows[0])[0], draw(logits[2:], rows[2])[0]]
    assert 0 <= draw(logits[1:2], Row(top_p=0.5))[0] < 1500


def test_logits_are_not_changed_and_an_all_greedy_batch_is_one_argmax() -> None:
    logits = random_logits(5, 300)
    before = logits.clone()
    assert draw(logits, *[Row(temperature=0.0)] * 5) == before.argmax(dim=-1).tolist()
    draw(logits, *FILTERS[:5])
    assert torch.equal(logits, before)


def test_split_rows() -> None:
    assert split_rows(
        [0.0, 1.0, 1.0, 1.0, 1.0, 1.0], [0, 0, 1, 2, 0, 0], [1, 1, 1, 1, 0.5, 1], [0, 0, 0, 0, 0, 0.1]
    ) == (
        [1],
        [3, 4, 5],
    )
    assert is_greedy(9.9e-6, 0) and is_greedy(1.0, 1) and not is_greedy(1e-5, 0)
    assert has_filter(2, 1.0, 0.0) and has_filter(0, 0.99, 0.0) and has_filter(0, 1.0, 0.1)
    assert not has_filter(0, 1.0, 0.0)


@pytest.mark.parametrize("row", [Row(temperature=0.0), Row(), Row(top_k=5), Row(top_p=0.9)])
def test_rows_without_a_finite_largest_logit_are_void_and_leave_their_neighbours_alone(row: Row) -> None:
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
    alone = [draw(logits[index : index + 1].clone(), row)[0] for index in range(5)]
    logits[1] = -math.inf
    logits[2, 7] = math.nan
    logits[3, 9] = math.inf
    sampled = sample(logits, tensors([row] * 5))
    assert sampled.is_void.tolist() == [False, True, True, True, False]
    assert all(0 <= token < 300 for token in sampled.token_ids.tolist())
    assert [sampled.token_ids[index].item() for index in (0, 4)] == [alone[0], alone[4]]
