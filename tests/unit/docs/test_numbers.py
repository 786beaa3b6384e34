"""The notes' arithmetic, done again: what they state follows from the models' shapes."""

from typing import NamedTuple

import pytest
import torch

from folovllm.worker_proc.sample.random import uniform
from tests.sources import ROOT

CPU_BYTES_PER_S = 27e9
GPU_BYTES_PER_S = 3.2e12


class Shape(NamedTuple):
    """A model's shape; embedding and head are tied."""

    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    head_norms: bool

    @property
    def parameters(self) -> int:
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        norms = 2 * self.hidden + (2 * self.head_dim if self.head_norms else 0)
        layer = self.hidden * (2 * q + 2 * kv) + 3 * self.hidden * self.intermediate + norms
        return self.vocab * self.hidden + self.layers * layer + self.hidden

    @property
    def kv_bytes(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * 2

    def step_bytes(self, batch: int, context: int) -> int:
        return 2 * self.parameters + batch * context * self.kv_bytes

    def step_operations(self, batch: int, context: int) -> int:
        return batch * (2 * self.parameters + 4 * self.layers * self.heads * self.head_dim * context)


SMOLLM2 = Shape(49152, 576, 1536, 30, 9, 3, 64, head_norms=False)
QWEN3 = Shape(151936, 1024, 3072, 28, 16, 8, 128, head_norms=True)


def _note(number: str) -> str:
    (path,) = (ROOT / "docs" / "learn").glob(f"{number}_*.md")
    return " ".join(path.read_text(encoding="utf-8").split())


def _row(note: str, head: str) -> str:
    begin = note.index(f"| {head}")
    return note[begin : note.index(" | |", begin)]


def test_parameters_and_bytes_per_token() -> None:
    assert (SMOLLM2.parameters, QWEN3.parameters) == (134_515_008, 596_049_920)
    note = _note("01")
    assert f"P = {SMOLLM2.parameters / 1e6:.1f} M, {QWEN3.parameters / 1e6:.1f} M" in note
    for shape, name in ((SMOLLM2, "SmolLM2-135M"), (QWEN3, "Qwen3-0.6B")):
        dims = f"{shape.layers} | {shape.kv_heads} × {shape.head_dim}"
        assert f"| {name} | {dims} | {shape.kv_bytes:,} | {8192 * shape.kv_bytes / 1e6:.0f} MB |" in note


@pytest.mark.parametrize(
    ("shape", "batch", "column"), [(SMOLLM2, 1, 0), (SMOLLM2, 16, 1), (QWEN3, 1, 2), (QWEN3, 64, 3)]
)
def test_cost_of_a_decode_step(shape: Shape, batch: int, column: int) -> None:
    note = _note("01")
    num_bytes, operations = shape.step_bytes(batch, 256), shape.step_operations(batch, 256)

    def cell(head: str) -> float:
        return float(_row(note, head).split(" | ")[1 + column].split()[0].replace(",", ""))

    assert cell("KV cache read") == pytest.approx(batch * 256 * shape.kv_bytes / 1e6, rel=0.01)
    assert cell("operations |") == pytest.approx(operations / 1e9, rel=0.02)
    assert cell("operations per byte") == pytest.approx(operations / num_bytes, rel=0.05)
    assert cell("least time at 27 GB/s") == pytest.approx(num_bytes / CPU_BYTES_PER_S * 1e3, rel=0.01)
    assert cell("least time at 3.2 TB/s") == pytest.approx(num_bytes / GPU_BYTES_PER_S * 1e3, rel=0.06)


def test_passes_with_and_without_a_cache() -> None:
    without, with_cache = sum(128 + i for i in range(128)), 128 + 128 - 1
    assert f"**{without:,}** passes" in _note("01")
    assert f"**{with_cache}**, {without / with_cache:.0f} times fewer" in _note("01")


def test_the_two_uniform_numbers() -> None:
    seeds, answers, positions = torch.tensor([7, 7]), torch.tensor([0, 1]), torch.tensor([12, 12])
    first, second = uniform(seeds, answers, positions).tolist()
    assert f"u(seed 7, answer 0, position 12) = {first:.4f}" in _note("01")
    assert f"u(seed 7, answer 1, position 12) = {second:.4f}" in _note("01")


def test_requests_in_two_gibibytes() -> None:
    tokens = 2 * 2**30 // SMOLLM2.kv_bytes
    note = _note("03")
    assert f"**{tokens // 8192}** requests of SmolLM2-135M" in note
    assert f"**{tokens // 16 // (-(-300 // 16))}** requests of 300 tokens" in note
    assert f"{18} requests in 8 GiB" in note
    assert 8 * 2**30 // (4096 * QWEN3.kv_bytes) == 18
    assert f"{8 * 2**30 // (304 * QWEN3.kv_bytes)} requests. *Follow-up" in note


@pytest.mark.parametrize(("length", "shown"), [(100, "93.0 %"), (180, "96.0 %"), (300, "97.6 %"), (1000, "99.3 %")])
def test_utilisation_formula(length: int, shown: str) -> None:
    assert f"{100 * length / (length + 7.5):.1f} %" == shown
    assert f"{length:,}: {shown}" in _note("03")
