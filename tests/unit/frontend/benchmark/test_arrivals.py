"""When requests come: on average at the rate, as evenly as the burstiness says."""

import math

import numpy as np
import pytest

from folovllm.common.errors import ConfigError
from folovllm.frontend.benchmark.arrivals import arrival_times


def gaps(burstiness: float) -> np.ndarray:
    return np.diff(arrival_times(20_000, rate=5.0, burstiness=burstiness, seed=0))


def test_all_at_once() -> None:
    assert arrival_times(3, math.inf, 1.0, 0) == [0.0, 0.0, 0.0]
    assert arrival_times(0, math.inf, 1.0, 0) == arrival_times(0, 1.0, 1.0, 0) == []


def test_the_first_comes_at_once_and_the_others_in_order() -> None:
    times = arrival_times(50, 4.0, 1.0, seed=1)
    assert len(times) == 50 and times[0] == 0.0 and times == sorted(times)
    assert times == arrival_times(50, 4.0, 1.0, seed=1) != arrival_times(50, 4.0, 1.0, seed=2)


@pytest.mark.parametrize("burstiness, spread", [(1.0, 1.0), (4.0, 0.5), (0.25, 2.0)])
def test_the_spread_of_gaps(burstiness: float, spread: float) -> None:
    """A gamma distribution of shape b has the standard deviation 1/√b of its mean; Poisson's exponential one has 1."""
    found = gaps(burstiness)
    assert found.mean() == pytest.approx(0.2, rel=0.05)
    assert found.std() / found.mean() == pytest.approx(spread, rel=0.05)


def test_poisson_counts_have_their_mean_as_variance() -> None:
    times = arrival_times(20_000, rate=10.0, burstiness=1.0, seed=3)
    counts, _ = np.histogram(times, np.arange(0, int(times[-1])))
    assert counts.var() == pytest.approx(counts.mean(), rel=0.1)


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan])
def test_rates_that_are_none(rate: float) -> None:
    with pytest.raises(ConfigError, match=r"--request-rate .* must be above 0, or inf"):
        arrival_times(1, rate, 1.0, 0)


@pytest.mark.parametrize("burstiness", [0.0, -1.0, math.nan, math.inf])
def test_burstiness_that_is_none(burstiness: float) -> None:
    with pytest.raises(ConfigError, match=r"--burstiness .* must be a finite number above 0"):
        arrival_times(1, 1.0, burstiness, 0)
