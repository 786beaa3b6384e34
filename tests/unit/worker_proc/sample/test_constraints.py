import math

import torch

from folovllm.worker_proc.sample.constraints import MinTokens, Precedence, apply_constraints

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
