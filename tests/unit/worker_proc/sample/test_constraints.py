import math

import numpy as np
import torch

from folovllm.worker_proc.sample.constraints import (
    AllowedTokenIds,
    Constraint,
    LogitBias,
    MinTokens,
    Precedence,
    apply_constraints,
)

CPU = torch.device("cpu")


class Recorder:
    def __init__(self, precedence: Precedence, calls: list[Precedence]) -> None:
        self.precedence = precedence
        self._calls = calls

    def apply(self, logits: torch.Tensor) -> None:
        self._calls.append(self.precedence)


def test_L07_min_tokens_forbids_the_whole_stop_set_in_its_rows_only() -> None:
    logits = torch.zeros(3, 10)
    apply_constraints(logits, [MinTokens([(0, [2, 9]), (2, [5])], 10, CPU)])
    forbidden = (logits == -math.inf).nonzero().tolist()
    assert forbidden == [[0, 2], [0, 9], [2, 5]]


def test_stop_ids_without_a_column_are_passed_over() -> None:
    logits = torch.zeros(1, 4)
    apply_constraints(logits, [MinTokens([(0, [4, 151_936, -1, 3])], 4, CPU)])
    assert logits.tolist() == [[0.0, 0.0, 0.0, -math.inf]]
    apply_constraints(logits, [MinTokens([(0, [])], 4, CPU)])
    assert logits.tolist() == [[0.0, 0.0, 0.0, -math.inf]]


def test_a_row_may_be_left_without_a_token() -> None:
    logits = torch.zeros(2, 3)
    apply_constraints(logits, [MinTokens([(1, [0, 1, 2])], 3, CPU)])
    assert logits.tolist() == [[0.0] * 3, [-math.inf] * 3]


def test_without_constraints_logits_stay_as_they_are() -> None:
    logits = torch.randn(2, 3)
    before = logits.clone()
    apply_constraints(logits, [])
    assert torch.equal(logits, before)


def test_constraints_run_in_order_of_precedence_whatever_order_they_are_given_in() -> None:
    calls: list[Precedence] = []
    apply_constraints(torch.zeros(1, 2), [Recorder(precedence, calls) for precedence in reversed(Precedence)])
    assert calls == list(Precedence)
    assert calls[0] is Precedence.LOGIT_BIAS and calls[-1] is Precedence.MIN_TOKENS


def test_biases_are_added_in_their_rows() -> None:
    logits = torch.ones(3, 5)
    values = np.array([0.5, -100.0], np.float32)
    apply_constraints(logits, [LogitBias([(2, [4, 0], values), (0, np.array([1]), values[:1])], CPU)])
    assert logits.tolist() == [[1, 1.5, 1, 1, 1], [1] * 5, [-99, 1, 1, 1, 1.5]]


def test_only_allowed_tokens_keep_their_logits() -> None:
    logits = torch.arange(15.0).view(3, 5)
    apply_constraints(logits, [AllowedTokenIds([(2, [4, 0]), (1, [])], CPU)])
    none = -math.inf
    assert logits.tolist() == [[0, 1, 2, 3, 4], [none] * 5, [10, none, none, none, 14]]


def test_L14_a_bias_forbids_nothing() -> None:
    """-100 on every allowed token still leaves one of them the best."""
    logits = torch.arange(15.0).view(3, 5)[:1]
    bias = LogitBias([(0, [1, 2], np.array([-100, -100], np.float32))], CPU)
    apply_constraints(logits, [AllowedTokenIds([(0, [1, 2])], CPU), bias])
    assert int(logits.argmax()) == 2
    assert math.isfinite(float(logits.max()))


def test_forbidding_comes_after_whatever_adds() -> None:
    """A processor that gives a forbidden token a high logit does not bring it back."""

    class Processor:
        precedence = Precedence.LOGITS_PROCESSORS

        def apply(self, logits: torch.Tensor) -> None:
            logits.fill_(1000.0)

    logits = torch.zeros(1, 4)
    constraints: list[Constraint] = [
        MinTokens([(0, [0])], 4, CPU),
        AllowedTokenIds([(0, [0, 1])], CPU),
        Processor(),
        LogitBias([(0, [3], np.array([50], np.float32))], CPU),
    ]
    apply_constraints(logits, constraints)
    assert logits.tolist() == [[-math.inf, 1000.0, -math.inf, -math.inf]]
