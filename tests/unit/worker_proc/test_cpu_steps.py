"""Which steps are given to the compiled network, and that they arrive as they are."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from folovllm.worker_proc.cpu_steps import CpuSteps
from folovllm.worker_proc.input_batch import InputBatch
from folovllm.worker_proc.step_arrays import StepArrays


class FakeNetwork:
    max_rows = 4

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def forward(self, *arguments: Any) -> torch.Tensor:
        self.calls.append(arguments)
        return torch.zeros(len(arguments[4]), 8)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + 1


def batch(query_lens: list[int], num_decodes: int) -> InputBatch:
    metadata = SimpleNamespace(
        query_lens=query_lens,
        num_decodes=num_decodes,
        slot_mapping="slots",
        block_table="table",
        seq_lens=[7] * len(query_lens),
    )
    return cast(InputBatch, SimpleNamespace(input_ids="ids", positions="positions", metadata=metadata))


@pytest.mark.parametrize("rows", [1, 4])
def test_few_decodes_are_taken(rows: int) -> None:
    network = FakeNetwork()
    hidden = CpuSteps(lambda: network).forward(batch([1] * rows, rows))
    assert hidden is not None and hidden.shape == (rows, 8)
    assert network.calls == [("ids", "positions", "slots", "table", [7] * rows)]


@pytest.mark.parametrize(("query_lens", "num_decodes"), [([1] * 5, 5), ([1, 3], 1), ([8], 0)])
def test_more_of_them_or_chunks_are_left_to_the_runner(query_lens: list[int], num_decodes: int) -> None:
    network = FakeNetwork()
    assert CpuSteps(lambda: network).forward(batch(query_lens, num_decodes)) is None
    assert not network.calls


def test_logits_of_few_rows_are_taken_whatever_the_step_was() -> None:
    steps = CpuSteps(FakeNetwork)
    logits = steps.logits(torch.zeros(4, 8))
    assert logits is not None and torch.equal(logits, torch.ones(4, 8))
    assert steps.logits(torch.zeros(5, 8)) is None


def test_everything_is_left_to_the_runner_until_the_network_is_compiled() -> None:
    network: list[FakeNetwork] = []
    steps = CpuSteps(lambda: network[0] if network else None)
    assert steps.forward(batch([1], 1)) is None and steps.logits(torch.zeros(1, 8)) is None
    network.append(FakeNetwork())
    assert steps.forward(batch([1], 1)) is not None and steps.logits(torch.zeros(1, 8)) is not None


def test_no_step_is_replayed() -> None:
    assert CpuSteps(FakeNetwork).replay(1, cast(StepArrays, None)) is None
