"""What the benchmarks count, without an engine; and that each script can be asked for help."""

import json
import pathlib
import subprocess
import sys

import pytest

from bench import kv_memory, latency, report
from bench.workload import Lengths, exactly, mixed_lengths, percentile, random_prompts
from tests.sources import ROOT

SCRIPTS = sorted(
    path.stem for path in (ROOT / "bench").glob("*.py") if 'if __name__ == "__main__":' in path.read_text("utf-8")
)


def test_all_scripts_are_found() -> None:
    assert set(SCRIPTS) >= {"core_step", "latency", "milestones", "report", "startup", "throughput"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_works(script: str) -> None:
    command = [sys.executable, "-m", f"bench.{script}", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert "usage:" in done.stdout
    assert not done.stderr


def test_the_same_seed_gives_the_same_work() -> None:
    assert random_prompts([3, 5], seed=1) == random_prompts([3, 5], seed=1) != random_prompts([3, 5], seed=2)
    assert [len(prompt) for prompt in random_prompts([3, 5], seed=1)] == [3, 5]
    assert mixed_lengths(20, seed=1) == mixed_lengths(20, seed=1) != mixed_lengths(20, seed=2)


def test_mixed_lengths_keep_their_bounds() -> None:
    lengths = mixed_lengths(500, seed=0)
    assert all(16 <= length.prompt <= 1024 and 16 <= length.output <= 256 for length in lengths)
    assert len({length.prompt for length in lengths}) > 100


def test_an_answer_has_exactly_the_length_asked_for() -> None:
    params = exactly(7)
    assert (params.max_tokens, params.ignore_eos, params.temperature) == (7, True, 0.0)


@pytest.mark.parametrize(("percent", "expected"), [(50, 3.0), (99, 4.96), (1, 1.04)])
def test_percentile(percent: int, expected: float) -> None:
    assert percentile([5.0, 1.0, 4.0, 2.0, 3.0], percent) == pytest.approx(expected)
    assert percentile([2.5], percent) == 2.5


def test_latency_counts_gaps_after_the_first_token() -> None:
    samples = [latency.Sample([0.1, 0.12, 0.16]), latency.Sample([0.3, 0.33, 0.36]), latency.Sample([0.2, 0.21, 0.22])]
    figures = latency.summary(samples)
    assert figures["ttft_ms"] == pytest.approx(200)
    assert figures["tpot_ms"] == pytest.approx(30)
    assert figures["e2e_ms"] == pytest.approx(220)
    assert figures["output_tokens_per_s"] == pytest.approx(3 / 0.22)


def test_requests_that_fit() -> None:
    """A budget of 1,000 tokens: 62 blocks of 16. Requests of 20 + 12 tokens take 2 blocks, of 33 + 0 take 3."""
    assert kv_memory.fit_contiguous(1000, 100) == 10
    assert kv_memory.fit_contiguous(99, 100) == 0
    assert kv_memory.fit_paged(1000, 16, [Lengths(20, 12)]) == 31
    assert kv_memory.fit_paged(1000, 16, [Lengths(20, 12), Lengths(33, 0)]) == 25  # 12 pairs of 5 blocks, and 2 more


def test_bytes_of_a_token(tmp_path: pathlib.Path) -> None:
    """The demo model's shape: 2 · 30 layers · 3 heads · 64 · 2 bytes."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert kv_memory.kv_bytes_per_token(tmp_path, 2) == 23_040


def test_the_report_replaces_what_stands_between_its_markers() -> None:
    page = "# A\n<!-- m1:begin -->\nold\n<!-- m1:end -->\nrest\n<!-- m2:begin -->\nx\n<!-- m2:end -->\n"
    filled = report.fill(page, "m1", "new \\1 text")
    assert filled == page.replace("old", "\nnew \\1 text\n")
    assert report.fill(filled, "m1", "new \\1 text") == filled
    with pytest.raises(ValueError, match="m3 0 times"):
        report.fill(page, "m3", "text")


def test_the_page_has_markers_for_every_section() -> None:
    page = (ROOT / "docs" / "performance.md").read_text("utf-8")
    for name in report.SECTIONS:
        report.fill(page, name, "text")
