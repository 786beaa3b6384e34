"""How gaps are counted, and how a target is compared with fixed chunks."""

import pytest

from bench.chunked_prefill import Figures, Setting, compare, gaps_between, settings, ttft_ratio

CHUNKS = [Setting(f"chunks of {chunk}", {}, chunk=chunk) for chunk in (64, 128, 256)]
TARGET = Setting("target 100 ms", {}, target_ms=100.0)


def figures_of(gap_s: float, *ttft_s: float) -> Figures:
    return Figures([[gap_s] * 100 for _ in ttft_s], [[seconds] for seconds in ttft_s])


def test_gaps_that_overlap_the_prompts_time_count() -> None:
    streams = [[0.0, 1.0, 2.0, 3.5, 5.0, 6.0], [1.5, 1.75]]
    assert gaps_between(streams, 1.5, 4.0) == [1.0, 1.5, 1.5, 0.25]


def test_every_chunk_and_every_target_is_a_setting() -> None:
    chosen = settings((32, 64), 4000)
    assert [setting.chunk for setting in chosen if setting.chunk] == [32, 64]
    assert [setting.target_ms for setting in chosen if setting.target_ms] == [60.0, 120.0, 250.0]
    assert chosen[0].options["max_num_batched_tokens"] > 4000


def test_gaps_of_all_rounds_are_taken_together_and_each_rounds_are_kept() -> None:
    figures = Figures([[0.01] * 99 + [0.05], [0.02] * 100], [[1.0, 3.0, 2.0], [5.0]])
    assert figures.row() == {
        "gap_p50_ms": pytest.approx(20.0),
        "gap_p99_ms": pytest.approx(20.0),
        "gap_max_ms": pytest.approx(50.0),
        "ttft_ms": pytest.approx(2500.0),
    }
    assert figures.rounds()["ttft_ms"] == [2000.0, 5000.0]
    assert figures.rounds()["gap_p99_ms"] == pytest.approx([10.4, 20.0])


def test_the_first_token_is_compared_within_rounds() -> None:
    """The machine was three times as slow in the second round, and the median of each by itself would not know."""
    assert ttft_ratio(figures_of(0.1, 1.1, 3.3, 1.1), figures_of(0.1, 1.0, 3.0, 1.0)) == pytest.approx(1.1)


def test_a_target_is_compared_with_the_fastest_chunk_that_is_as_smooth() -> None:
    figures = {
        "chunks of 64": figures_of(0.05, 3.0),
        "chunks of 128": figures_of(0.09, 2.0),
        "chunks of 256": figures_of(0.2, 1.0),
        "target 100 ms": figures_of(0.095, 2.2),
    }
    (found,) = compare(figures, [*CHUNKS, TARGET])
    assert found["p99_of_target"] == pytest.approx(0.95)
    assert found["best_chunk"] == 128 and found["ttft_of_best_chunk"] == pytest.approx(1.1)
    assert found["late"] == 0.0


def test_a_target_that_is_missed_is_compared_with_chunks_that_are_as_rough() -> None:
    figures = {
        "chunks of 64": figures_of(0.05, 3.0),
        "chunks of 128": figures_of(0.09, 2.0),
        "chunks of 256": figures_of(0.2, 1.0),
        "target 100 ms": figures_of(0.25, 2.2),
    }
    (found,) = compare(figures, [*CHUNKS, TARGET])
    assert found["best_chunk"] == 256 and found["ttft_of_best_chunk"] == pytest.approx(2.2)
    assert found["late"] == 1.0 and found["p99_of_target_by_round"] == pytest.approx([2.5])


def test_no_chunk_may_be_as_smooth() -> None:
    figures = {setting.name: figures_of(0.2, 1.0) for setting in CHUNKS} | {"target 100 ms": figures_of(0.1, 2.0)}
    (found,) = compare(figures, [*CHUNKS, TARGET])
    assert found["best_chunk"] is None and found["ttft_of_best_chunk"] is None
