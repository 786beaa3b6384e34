"""How long a step takes, learnt from the steps that were run; and how much of a prompt fits into a given time.

Idea: a step's time is nearly linear in four figures of its load: requests that decode, context tokens that are read,
prompt tokens, and pairs of a prompt token with a token it attends to. The five coefficients (one is constant) are
fitted by least squares to the last steps. Three rings of samples keep apart what the fit must not forget: steps that
only decode (the base, of which there are thousands between two prompts), mixed steps (what is asked for), and steps
without a decode, which count for little: they say what a prompt token costs before there was any mixed step.

A fit over many steps is slow to see that the machine has become slower or faster (other programs, another clock rate).
So predictions for mixed steps are scaled by how far off the fit has been for the last five of them, as a median, or by
the last one alone if that was slower: slow steps come in runs, and a chunk that was made too small for nothing costs
little. A target is about late tokens, not usual ones, so less than the target is planned: by a tenth, or by what one
mixed step in 32 took longer than was expected *when it was planned*. Replayed on 67 s of recorded steps of a shared
machine, with other programs on it at times, the 99th percentile falls from 1.29, 1.26 and 1.29 of targets of 60, 120
and 250 ms to 1.14, 1.06 and 1.02, and a prompt takes 6, 4 and 2 % longer.

A figure at the edge of experience is not trusted: the answer is at most twice what a mixed step has had lately, so a
wrong first guess costs one late token, not ten. Noise is met by weights: errors count relative to the measured time,
and samples that are far off (a machine that paused) are left out of a second fit.

Cost: 0.14 ms for a fit of 160 samples and the search, paid only in a step that has a target, decodes and a prompt to
share it.
"""

import collections
from collections.abc import Iterable
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

_NUM_DECODE_STEPS: Final = 48
_NUM_MIXED_STEPS: Final = 96
_NUM_PREFILL_STEPS: Final = 16
_WEIGHT_WITHOUT_DECODES: Final = 0.1
_NUM_RECENT: Final = 16  # mixed steps whose size says how far experience goes
_FIRST_CHUNK: Final = 32
_GROWTH: Final = 2.0
_NUM_DRIFT: Final = 5  # mixed steps that say how fast the machine is just now
_MOST_DRIFT: Final = 2.0
_NUM_LEARNING: Final = 8  # mixed steps until it is the machine that is late, and not the fit that is wrong
_LATE_OF: Final = 32  # one mixed step in so many may take longer than the target
_LEAST_CAUTION: Final = 1.1
_MOST_CAUTION: Final = 1.5
_LEAST_S: Final = 1e-6
_RIDGE: Final = 1e-3
_FAR_OFF: Final = 0.5  # relative error from which a sample is left out of the second fit
_SCALE: Final = np.array([1.0, 16.0, 8192.0, 256.0, 262144.0])  # brings coefficients to one order of magnitude

_Figures = npt.NDArray[np.float64]


class StepLoad(NamedTuple):
    """What a step has to do.

    Attributes:
        num_decodes: requests with one token.
        num_context: tokens in the cache that are read for these and for prompts, all together.
        num_prefill: tokens of the others.
        num_pairs: for each of these tokens, how many it attends to; all together.
    """

    num_decodes: int
    num_context: int
    num_prefill: int = 0
    num_pairs: float = 0.0

    @property
    def is_mixed(self) -> bool:
        """Whether it holds decodes and tokens of prompts."""
        return self.num_decodes > 0 and self.num_prefill > 0

    def with_chunk(self, num_tokens: int, num_computed: int) -> "StepLoad":
        """The load with `num_tokens` more of a prompt, `num_computed` of which are in the cache."""
        pairs = num_tokens * (num_computed + (num_tokens + 1) / 2)
        return self._replace(
            num_context=self.num_context + num_computed,
            num_prefill=self.num_prefill + num_tokens,
            num_pairs=self.num_pairs + pairs,
        )


class StepTimeModel:
    """Fed with every step's load and time."""

    def __init__(self) -> None:
        self._decode_steps: collections.deque[tuple[StepLoad, float]] = collections.deque(maxlen=_NUM_DECODE_STEPS)
        self._mixed_steps: collections.deque[tuple[StepLoad, float]] = collections.deque(maxlen=_NUM_MIXED_STEPS)
        self._prefill_steps: collections.deque[tuple[StepLoad, float]] = collections.deque(maxlen=_NUM_PREFILL_STEPS)
        self._lateness: collections.deque[float] = collections.deque(maxlen=_NUM_MIXED_STEPS)
        self._coefficients: _Figures | None = None
        self._drift = 1.0

    def observe(self, load: StepLoad, seconds: float, expected_s: float = 0.0) -> None:
        """A step of this load took so long, from when the worker was free for it to its result.

        `expected_s`: what `predict` said when the step was made; 0 if it was not asked.
        """
        if seconds <= 0:
            return
        if not load.num_prefill:
            self._decode_steps.append((load, seconds))
        elif load.is_mixed:
            if expected_s > 0 and len(self._mixed_steps) >= _NUM_LEARNING:
                self._lateness.append(seconds / expected_s)
            self._mixed_steps.append((load, seconds))
        else:
            self._prefill_steps.append((load, seconds))
        self._coefficients = None

    def predict(self, load: StepLoad) -> float:
        """Seconds that a step of this load will take; 0 while there is nothing to go by."""
        if self._coefficients is None:
            self._coefficients = self._fit()
            self._drift = self._look_back(self._coefficients)
        seconds = float(_figures([load])[0] @ self._coefficients)
        return seconds * self._drift if load.is_mixed else seconds

    def max_prefill_tokens(self, load: StepLoad, num_computed: int, seconds: float, most: int) -> int:
        """How many tokens of a prompt can join a step so that it takes no longer than `seconds`.

        Args:
            load: the step without them.
            num_computed: tokens of that prompt that are in the cache.
            seconds: what the step may take; less is planned.
            most: bound on the answer.

        Returns:
            0 to `most`.
        """
        recent = [step.num_prefill for step, _ in list(self._mixed_steps)[-_NUM_RECENT:]]
        most = min(most, int(max(recent) * _GROWTH) if recent else _FIRST_CHUNK)
        seconds /= self._caution()
        fewest, too_many = 0, most + 1  # predicted time never falls with more tokens, so the answer can be searched
        while too_many - fewest > 1:
            middle = (fewest + too_many) // 2
            if self.predict(load.with_chunk(middle, num_computed)) <= seconds:
                fewest = middle
            else:
                too_many = middle
        return fewest

    def _look_back(self, coefficients: _Figures) -> float:
        """What the last mixed steps took, as a multiple of what the fit says."""
        if len(self._mixed_steps) < _NUM_DRIFT:
            return 1.0
        last = list(self._mixed_steps)[-_NUM_DRIFT:]
        expected = _figures(load for load, _ in last) @ coefficients
        ratios = np.array([time for _, time in last]) / np.maximum(expected, _LEAST_S)
        return min(max(float(np.median(ratios)), float(ratios[-1]), 1 / _MOST_DRIFT), _MOST_DRIFT)

    def _caution(self) -> float:
        """The target as a multiple of what is planned."""
        if not self._lateness:
            return _LEAST_CAUTION
        late = sorted(self._lateness)[-1 - len(self._lateness) // _LATE_OF]
        return min(max(late, _LEAST_CAUTION), _MOST_CAUTION)

    def _fit(self) -> _Figures:
        samples = [*self._decode_steps, *self._mixed_steps, *self._prefill_steps]
        if not samples:
            return np.zeros(_SCALE.size)
        seconds = np.array([time for _, time in samples])
        weights = 1.0 / seconds
        if len(samples) > len(self._prefill_steps) > 0:
            weights[-len(self._prefill_steps) :] *= _WEIGHT_WITHOUT_DECODES
        figures = _figures(load for load, _ in samples)
        coefficients = _least_squares(figures, seconds, weights)
        near = np.abs(figures @ coefficients / seconds - 1.0) < _FAR_OFF
        if near.sum() > _SCALE.size and not near.all():
            coefficients = _least_squares(figures[near], seconds[near], weights[near])
        return coefficients


def _figures(loads: Iterable[StepLoad]) -> _Figures:
    """[N, 5]: a constant and the four figures of each load, scaled."""
    figures: _Figures = np.array([(1.0, *load) for load in loads]) / _SCALE
    return figures


def _least_squares(figures: _Figures, seconds: _Figures, weights: _Figures) -> _Figures:
    """Coefficients, none below 0: nothing makes a step faster.

    Those that come out negative are held at 0 and the others fitted again. A little ridge decides between figures that
    always went together (a constant number of decoding requests and the constant).
    """
    left = figures * weights[:, None]
    right = seconds * weights
    active = np.ones(figures.shape[1], np.bool_)
    coefficients = np.zeros(figures.shape[1])
    while active.any():
        columns = left[:, active]
        normal = columns.T @ columns + _RIDGE * np.eye(columns.shape[1])
        solved = np.linalg.solve(normal, columns.T @ right)
        coefficients[:] = 0.0
        coefficients[active] = solved
        if (solved >= 0).all():
            break
        active[active] = solved >= 0
    return coefficients
