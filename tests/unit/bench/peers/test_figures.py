"""Medians, ratios, shares and tables, from made-up rounds."""

from typing import Any

import pytest

from bench.peers import figures
from bench.peers.work import WORKS

LIMITS = {
    "weight_bytes": 200e6,
    "kv_bytes_per_token": 20e3,
    "read_weights_gb_per_s": 20.0,
    "read_memory_gb_per_s": 18.0,
    "products_tokens_per_s": 2000.0,
    "products_gflop_per_s": 500.0,
    "square_gflop_per_s": 700.0,
}


def content(**changes: Any) -> dict[str, Any]:
    """Three rounds of all engines but one, at all works."""
    rates: dict[str, dict[str, list[float]]] = {work.name: {} for work in WORKS}
    rates["decode_1"] = {
        "own": [80.0, 84.0, 60.0],
        "bare": [84.0, 87.0, 63.0],
        "llama_cpp": [40.0, 42.0, 41.0],
        "vllm": [39.0, 60.0, 30.0],
    }
    rates["prefill_1024"] = {"own": [1500.0, 1500.0, 1700.0], "vllm": [1000.0, 1000.0, 1000.0]}
    rates["batch_16"] = {"own": [600.0, 500.0, 550.0]}
    return {
        "works": [list(work) for work in WORKS],
        "rates": rates,
        "limits": [LIMITS, LIMITS | {"read_weights_gb_per_s": 21.0}, LIMITS],
        "versions": {"own": "1", "vllm": "vllm 2"},
        "not_run": {"openvino": "its interpreter has no package openvino_genai"},
        "failed": {"batch_16": {"vllm": "out of memory"}},
        "agreement": {"vllm": 0.75},
        "starts": {"generate_s": [2.5, 2.0, 9.0], "first_token_s": {"own": 3.0, "vllm": 97.0}},
    } | changes


def rows(title: str, of: dict[str, Any]) -> list[list[str]]:
    return next(table.rows for table in figures.tables(of) if table.title.startswith(title))


def test_a_ratio_is_the_median_of_the_rounds_own() -> None:
    assert figures.median_ratio([80, 84, 60], [40, 42, 41]) == 2.0


def test_the_best_peer_has_the_highest_median_and_is_no_part_of_ours() -> None:
    assert figures.best_peer(content()["rates"]["decode_1"]) == "llama_cpp"
    assert figures.best_peer({"own": [1.0], "bare": [2.0], "vllm": []}) is None


def test_limits_of_decoding_count_what_is_read() -> None:
    short, long = WORKS[0], WORKS[-1]
    assert figures.limit_of(short, LIMITS) == pytest.approx(100.0)
    assert figures.limit_of(long, LIMITS) == pytest.approx(20e9 / (200e6 + 20e3 * 7032))
    assert figures.limit_of(WORKS[3], LIMITS) == 2000.0
    assert figures.limit_of(WORKS[1], LIMITS) is None


def test_every_engine_has_a_row_with_its_medians() -> None:
    table = {row[0]: row[1:] for row in rows("Tokens/s", content())}
    assert list(table) == ["FoloVLLM", "its worker alone", "llama.cpp", "vLLM, CPU"]
    assert table["FoloVLLM"] == ["80.0", "550.0", "–", "1,500.0", "–"]
    assert table["vLLM, CPU"] == ["39.0", "–", "–", "1,000.0", "–"]


def test_ratios_shares_and_goals_stand_beside_each_other() -> None:
    decode, batch, _, prefill, _ = rows("Ratios", content())
    assert decode[1:] == ["llama.cpp", "2.00", "1.3", "100.0", "80%", "80%"]
    assert batch[1:] == ["–", "–", "1.5", "–", "–", "–"]
    assert prefill[1:] == ["vLLM, CPU", "1.50", "1.1", "2,000.0", "75%", "70%"]


def test_the_engines_own_cost() -> None:
    (row,) = rows("LLM.generate", content())
    assert row[1:] == ["4.8%", "4%"]


def test_starts() -> None:
    assert rows("Start", content()) == [
        ["`folovllm generate`, whole process, median", "2.50", "3"],
        ["FoloVLLM", "3.00", "–"],
        ["vLLM, CPU", "97.00", "–"],
    ]


def test_tables_without_rows_are_left_out() -> None:
    nothing = content(
        rates={work.name: {"own": [1.0]} for work in WORKS},
        limits=[LIMITS],
        starts={"generate_s": [], "first_token_s": {}},
    )
    titles = [table.title for table in figures.tables(nothing)]
    assert not [title for title in titles if title.startswith(("Start", "LLM.generate"))]
    assert len(titles) == 3


def test_the_machine_is_told_with_units() -> None:
    assert rows("The machine", content()) == [
        ["reads of 200 MB, the weights' size", "20.0 GB/s"],
        ["reads of 2 GiB", "18.0 GB/s"],
        ["the linear layers' products, 1,024 rows", "500 GFLOP/s"],
        ["a product of 2,048 × 2,048 × 2,048", "700 GFLOP/s"],
    ]


def test_who_did_not_run_is_named_with_the_reason() -> None:
    assert figures.remarks(content()) == [
        "FoloVLLM: 1",
        "vLLM, CPU: vllm 2",
        "OpenVINO GenAI did not run: its interpreter has no package openvino_genai",
        "vLLM, CPU failed at batch_16: out of memory",
        "vLLM, CPU: 75% of first tokens are FoloVLLM's",
    ]
