"""The sampling kernels give the very tokens that `sample.sampler` defines."""

import math

import pytest
import torch

from folovllm.common.sampling_params import GREEDY_TEMPERATURE
from folovllm.worker_proc.sample.sampler import SamplingTensors, sample

NUM_SLOTS = 8
COLUMNS = 5000  # three chunks, the last one not full


def run(
    device: torch.device,
    logits: torch.Tensor,
    temperature: list[float],
    slots: list[int],
    *,
    all_greedy: bool,
    filters: list[tuple[int, float, float]] | None = None,
) -> tuple[list[int], torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens drawn, the rows of tokens, the integer parameters and the lengths."""
    from folovllm.worker_proc.kernels.triton import sampling
    from folovllm.worker_proc.kernels.triton.sampling import SamplingRows, SamplingScratch, sample_decodes

    generator = torch.Generator().manual_seed(1)
    floats = torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64).repeat(NUM_SLOTS, 1)
    integers = torch.randint(-(2**62), 2**62, (NUM_SLOTS, 5), generator=generator)
    integers[:, 0], integers[:, 2], integers[:, 3] = 0, torch.arange(NUM_SLOTS), 2
    for slot, value in zip(slots, temperature, strict=True):
        if slot >= 0:
            floats[slot, 0] = value
    for slot, (top_k, top_p, min_p) in zip(slots, filters or [], strict=bool(filters)):
        integers[slot, 0], floats[slot, 1], floats[slot, 2] = top_k, top_p, min_p
    seq_lens = torch.arange(3, 3 + len(slots))
    rows = SamplingRows(
        floats.to(device), integers.to(device), torch.zeros(NUM_SLOTS, 20, dtype=torch.int32, device=device)
    )
    out = torch.full((len(slots),), -7, dtype=torch.int32, device=device)
    scratch = SamplingScratch(len(slots), COLUMNS, device)
    args = (logits.to(device), COLUMNS, torch.tensor(slots, device=device), seq_lens.to(device), rows, scratch, out)
    sample_decodes(*args, needs=sampling.FILTERED if filters else sampling.GREEDY if all_greedy else sampling.DRAWN)
    return out.tolist(), rows.token_ids.cpu(), integers, seq_lens


def expected(logits: torch.Tensor, temperature: list[float], integers: torch.Tensor, lens: torch.Tensor) -> list[int]:
    """The reference's tokens; `integers` are the rows' own."""
    plain = [row for row, value in enumerate(temperature) if value >= GREEDY_TEMPERATURE]
    ones = torch.ones(len(temperature))
    params = SamplingTensors(
        temperature=torch.tensor(temperature),
        top_k=integers[:, 0],
        top_p=ones.double(),
        min_p=ones * 0,
        seed=integers[:, 1],
        sample_index=integers[:, 2],
        position=lens - integers[:, 3],
        plain_rows=torch.tensor(plain) if plain else None,
        filtered_rows=None,
    )
    return sample(logits[:, :COLUMNS], params).token_ids.tolist()


@pytest.mark.parametrize("seed", range(4))
def test_same_tokens_as_the_reference(device: torch.device, seed: int) -> None:
    slots, temperature = [5, 0, 7, 2, 1, 3], [1.0, 0.6, 0.0, 2.0, 1e-3, 100.0]
    logits = torch.randn(6, COLUMNS + 8, generator=torch.Generator().manual_seed(seed)) * 3
    tokens, rows, integers, lens = run(device, logits, temperature, slots, all_greedy=False)
    assert tokens == expected(logits, temperature, integers[slots], lens)
    assert [int(rows[slot, length]) for slot, length in zip(slots, lens.tolist(), strict=True)] == tokens


FILTERS = [
    (0, 1.0, 0.0),
    (1, 1.0, 0.0),
    (50, 1.0, 0.0),
    (0, 0.9, 0.0),
    (0, 1.0, 0.2),
    (20, 0.95, 0.01),
    (6000, 0.5, 0.0),
]


@pytest.mark.parametrize("spread", [0.5, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_filters_keep_what_the_reference_keeps(device: torch.device, spread: float, dtype: torch.dtype) -> None:
    """In bf16 many logits are equal, so ties meet every boundary."""
    slots, temperature = [6, 2, 3, 1, 0, 5, 4], [1.0, 1.0, 0.7, 1.0, 1.5, 0.6, 1.0]
    for seed in range(3):
        logits = torch.randn(7, COLUMNS + 8, generator=torch.Generator().manual_seed(seed)) * spread
        logits = logits.to(dtype)
        tokens, _, integers, lens = run(device, logits, temperature, slots, all_greedy=False, filters=FILTERS)
        rows = integers[slots]
        params = SamplingTensors(
            temperature=torch.tensor(temperature),
            top_k=torch.tensor([top_k for top_k, _, _ in FILTERS]),
            top_p=torch.tensor([top_p for _, top_p, _ in FILTERS], dtype=torch.float64),
            min_p=torch.tensor([min_p for _, _, min_p in FILTERS]),
            seed=rows[:, 1],
            sample_index=rows[:, 2],
            position=lens - rows[:, 3],
            plain_rows=torch.tensor([0]),
            filtered_rows=torch.tensor([2, 3, 4, 5, 6]),
        )
        assert tokens == sample(logits[:, :COLUMNS].float(), params).token_ids.tolist()


def test_greedy_takes_the_lowest_of_equals_and_nothing_beyond_the_last_column(device: torch.device) -> None:
    logits = torch.zeros(2, COLUMNS + 8)
    logits[0, [4321, 2500, 4000]] = 3.0
    logits[:, COLUMNS:] = 9.0
    assert run(device, logits, [0.0, 0.0], [1, 2], all_greedy=True)[0] == [2500, 0]


def test_padding_is_left_alone(device: torch.device) -> None:
    tokens, rows, *_ = run(device, torch.randn(2, COLUMNS), [1.0, 1.0], [-1, 3], all_greedy=False)
    assert tokens[0] == -7
    assert rows[[0, 1, 2, 4, 5, 6, 7]].count_nonzero() == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_a_finite_largest_is_void(device: torch.device, bad: float, temperature: float) -> None:
    logits = torch.zeros(2, COLUMNS)
    logits[0, 7] = bad
    logits[1] = -math.inf
    assert run(device, logits, [temperature] * 2, [0, 1], all_greedy=temperature == 0.0)[0] == [-1, -1]


def test_the_kernels_bound_of_greedy_is_everybodys(device: torch.device) -> None:
    from folovllm.worker_proc.kernels.triton import sampling

    assert sampling._GREEDY_TEMPERATURE.value == GREEDY_TEMPERATURE
