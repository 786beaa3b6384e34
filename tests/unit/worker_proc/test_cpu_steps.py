"""What is given to the compiled network arrives as it is, and everything is left to the runner until there is one."""

from types import SimpleNamespace
from typing import Any, cast

import torch

from folovllm.worker_proc.cpu_steps import CpuSteps
from folovllm.worker_proc.input_batch import InputBatch
from folovllm.worker_proc.step_arrays import StepArrays

BATCH = cast(InputBatch, SimpleNamespace(input_ids="ids", positions="positions", metadata="metadata"))


class FakeNetwork:
    """Has code for two rows."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def forward(self, *arguments: Any) -> torch.Tensor:
        self.calls.append(arguments)
        return torch.zeros(2, 8)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor | None:
        return hidden + 1 if len(hidden) <= 2 else None


def test_steps_and_logits_are_the_networks() -> None:
    network = FakeNetwork()
    steps = CpuSteps(lambda: network)
    hidden = steps.forward(BATCH)
    assert hidden is not None and network.calls == [("ids", "positions", "metadata")]
    logits = steps.logits(hidden)
    assert logits is not None and torch.equal(logits, torch.ones(2, 8))
    assert steps.logits(torch.zeros(3, 8)) is None


def test_everything_is_left_to_the_runner_until_the_network_is_compiled() -> None:
    network: list[FakeNetwork] = []
    steps = CpuSteps(lambda: network[0] if network else None)
    assert steps.forward(BATCH) is None and steps.logits(torch.zeros(1, 8)) is None
    network.append(FakeNetwork())
    assert steps.forward(BATCH) is not None and steps.logits(torch.zeros(1, 8)) is not None


def test_no_step_is_replayed() -> None:
    assert CpuSteps(FakeNetwork).replay(1, cast(StepArrays, None)) is None
