"""The figures that say what an FP8 cache does to logits."""

import math
import pathlib

import pytest
import torch

from bench.kv_quality import Effect, effect_on_logits, load
from tests.fakes.runner_driver import CPU_FLOAT32
from tests.fakes.tiny_models import make_model


def test_equal_logits_have_no_effect() -> None:
    effect = Effect()
    effect.add(torch.zeros(3, 4), torch.zeros(3, 4), torch.tensor([0, 1, 2]))
    effect.add(torch.eye(4), torch.eye(4), torch.tensor([0, 1, 2, 3]))
    figures = effect.figures()
    assert (figures["relative error of logits"], figures["same greedy token"]) == (0.0, 1.0)
    assert figures["KL, nats"] == pytest.approx(0.0, abs=1e-7)
    assert figures["perplexity"] == figures["perplexity, FP8"]


def test_each_figure_by_hand() -> None:
    exact, found = torch.tensor([[math.log(3), 0.0]]), torch.tensor([[0.0, math.log(3)]])
    effect = Effect()
    effect.add(exact, found, torch.tensor([0]))
    figures = effect.figures()
    assert figures["relative error of logits"] == pytest.approx(math.sqrt(2))
    assert figures["same greedy token"] == 0.0
    assert figures["KL, nats"] == pytest.approx(0.75 * math.log(3) - 0.25 * math.log(3))
    assert (figures["perplexity"], figures["perplexity, FP8"]) == pytest.approx((4 / 3, 4))


def test_the_effect_on_a_model_is_small_and_there(tmp_path: pathlib.Path) -> None:
    folder = make_model(tmp_path / "model", "qwen3")
    model, config = load(folder, CPU_FLOAT32, dummy=False)
    sequences = torch.randint(config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(3))
    figures = effect_on_logits(model, config, CPU_FLOAT32, sequences)
    assert 0.005 < figures["relative error of logits"] < 0.1 and figures["same greedy token"] > 0.85
    assert 0 < figures["KL, nats"] < 0.1
