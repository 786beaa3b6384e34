from typing import cast

import torch

from folovllm.worker_proc.input_batch import InputBatch
from folovllm.worker_proc.step_arrays import StepArrays
from folovllm.worker_proc.step_graphs import NoGraphs


def test_without_graphs_the_runner_computes_everything() -> None:
    graphs = NoGraphs()
    assert graphs.replay(1, cast(StepArrays, None)) is None
    assert graphs.forward(cast(InputBatch, None)) is None
    assert graphs.logits(torch.zeros(1, 4)) is None
