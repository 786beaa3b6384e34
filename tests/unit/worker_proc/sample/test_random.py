import math

import torch

from folovllm.worker_proc.sample.random import uniform


def draw(seed: torch.Tensor, sample_index: int = 0, position: int = 0) -> torch.Tensor:
    return uniform(seed, torch.full_like(seed, sample_index), torch.full_like(seed, position))


def splitmix64(x: int) -> int:
    mask = 2**64 - 1
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def test_bits_equal_the_hash_in_unbounded_integers() -> None:
    golden = 0x9E3779B97F4A7C15
    for seed, index, position in [
        (0, 0, 0),
        (1, 0, 0),
        (-1, 3, 9),
        (2**63 - 1, 2**31 - 1, 2**32 - 1),
        (-(2**63), 0, 5),
    ]:
        key = splitmix64((seed + golden) % 2**64)
        bits = splitmix64((key + ((index << 32) | position) * golden) % 2**64)
        expected = ((bits >> 12) + 0.5) / 2**52
        assert draw(torch.tensor([seed]), index, position).item() == expected


def test_first_number_of_splitmix64() -> None:
    # The published generator started at 0 gives 0xE220A8397B1DCDAF first; here it is the key of seed 0.
    assert splitmix64(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF


def test_numbers_are_inside_the_open_interval_and_uniform() -> None:
    count = 100_000
    for numbers in (
        uniform(torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.int64), torch.arange(count)),
        draw(torch.arange(count)),
        draw(torch.arange(count) << 40),
        uniform(torch.full((count,), 7), torch.arange(count), torch.zeros(count, dtype=torch.int64)),
    ):
        assert numbers.dtype == torch.float64 and numbers.min() > 0 and numbers.max() < 1
        counts = torch.histc(numbers.float(), bins=100, min=0, max=1)
        chi_squared = ((counts - count / 100) ** 2 / (count / 100)).sum().item()
        assert 50 < chi_squared < 160  # 99 degrees of freedom: mean 99, 1 in 10,000 beyond either bound
        neighbours = torch.corrcoef(torch.stack((numbers[:-1], numbers[1:])))[0, 1].item()
        assert abs(neighbours) < 4 / math.sqrt(count)


def test_every_argument_changes_the_number() -> None:
    base = draw(torch.tensor([5]), 1, 2).item()
    others = [draw(torch.tensor([5]), 1, 3), draw(torch.tensor([5]), 2, 2), draw(torch.tensor([6]), 1, 2)]
    values = {base, draw(torch.tensor([5]), 2, 1).item(), *(other.item() for other in others)}
    assert len(values) == 5


def test_L09_a_number_does_not_depend_on_its_neighbours() -> None:
    seeds = torch.arange(-50, 50)
    together = draw(seeds, 3, 8)
    for row in (0, 17, 99):
        assert draw(seeds[row : row + 1], 3, 8).item() == together[row].item()
