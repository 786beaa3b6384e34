"""When requests come: gaps of a gamma distribution, whose shape is the burstiness. 1 is a Poisson process."""

import math

import numpy as np

from folovllm.common.errors import ConfigError


def arrival_times(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Seconds from the start at which requests come, the first one at 0.

    Args:
        count: number of requests.
        rate: requests a second on average; infinity: all at once.
        burstiness: below 1 requests come in bursts, above 1 evenly; > 0.
        seed: of the gaps.

    Raises:
        ConfigError: rate or burstiness is out of range.
    """
    if not rate > 0:
        raise ConfigError(f"--request-rate {rate} must be above 0, or inf")
    if not burstiness > 0 or math.isinf(burstiness):
        raise ConfigError(f"--burstiness {burstiness} must be a finite number above 0")
    if math.isinf(rate):
        return [0.0] * count
    gaps = np.random.default_rng(seed).gamma(burstiness, 1 / (rate * burstiness), max(count - 1, 0))
    return [0.0, *(float(time) for time in np.cumsum(gaps))][:count]
