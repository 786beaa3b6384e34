"""What the GPU benchmark asks for and counts, on an engine that answers at once."""

import argparse
import functools
import json
import pathlib
from types import SimpleNamespace
from typing import Any, cast

import pytest

from bench import gpu
from bench.make_model import NUM_WORDS, TINY, write_tokenizer
from folovllm import LLM, SamplingParams
from folovllm.frontend.tokenizer import Tokenizer


class InstantLLM:
    """Gives as many tokens as are asked for; knows which prompts' beginnings it has seen."""

    def __init__(self, *, shorten: int = 0, finds: bool = True) -> None:
        self.calls: list[tuple[list[int], list[int], float]] = []
        self._shorten = shorten
        self._finds = finds

    def generate(self, prompts: list[list[int]], params: list[SamplingParams], *, use_tqdm: bool) -> list[Any]:
        assert not use_tqdm and all(each.ignore_eos for each in params)
        lengths = [each.max_tokens for each in params]
        temperature = cast("float", params[0].temperature)
        self.calls.append(([len(prompt) for prompt in prompts], cast("list[int]", lengths), temperature))
        return [
            SimpleNamespace(
                outputs=[SimpleNamespace(token_ids=[1] * (cast("int", length) - self._shorten))],
                metrics=SimpleNamespace(time_to_first_token=0.0),
                num_cached_tokens=16 if self._finds else 0,
            )
            for length in lengths
        ]


def ran(sizes: gpu.Sizes) -> dict[str, tuple[InstantLLM, gpu.Figures]]:
    found = {}
    for name, run in gpu.workloads(sizes).items():
        llm = InstantLLM()
        found[name] = llm, run(cast("LLM", llm), 1)
    return found


def test_the_workloads_are_those_of_the_table() -> None:
    found = ran(gpu.Sizes())
    assert list(found) == [
        "W2 1 request",
        "W3 32 requests",
        "W3 256 requests",
        "W4 1,024 tokens",
        "W4 4,096 tokens",
        "W4 16,384 tokens",
        "W4b 64 x 1,024",
        "prefix 4,096 tokens",
        "W1 mixed",
    ]
    assert {name.split()[0] for name in found} | {gpu.FP8, gpu.FLASH, gpu.Q4, gpu.SERVER} == set(gpu.ALL)
    assert found["W2 1 request"][0].calls == [([128], [512], 0.0)]
    assert found["W3 256 requests"][0].calls == [([128] * 256, [256] * 256, 0.0)]
    assert found["W4 16,384 tokens"][0].calls == [([16384], [1], 0.0)]
    assert found["prefix 4,096 tokens"][0].calls == [([4096], [1], 0.0)] * 2
    ((prompts, outputs, temperature),) = found["W1 mixed"][0].calls
    assert (len(prompts), temperature) == (256, 0.6)
    assert min(prompts + outputs) >= 100 and max(prompts + outputs) <= 1024
    assert all(value >= 0 for _, figures in found.values() for value in figures.values())


def test_quick_is_small() -> None:
    lengths = [length for llm, _ in ran(gpu.QUICK).values() for call in llm.calls for length in call[0] + call[1]]
    assert max(lengths) <= 128 and sum(lengths) < 2500


def test_an_answer_of_another_length_is_no_measurement() -> None:
    with pytest.raises(RuntimeError, match="another length"):
        gpu.first_token(16, cast("LLM", InstantLLM(shorten=1)), 1)
    with pytest.raises(RuntimeError, match="prefix was not found"):
        gpu.prefix(64, cast("LLM", InstantLLM(finds=False)), 1)


def test_medians_leave_the_first_run_out_and_no_seed_comes_twice() -> None:
    seconds, seeds = iter([90.0, 3.0, 1.0, 2.0] * 2), []

    def run(seed: int) -> gpu.Figures:
        seeds.append(seed)
        return {"s": next(seconds)}

    for name in ("W4 1,024 tokens", "W4 4,096 tokens"):
        result = gpu.measure(name, run, 3)
        assert (result["median"], result["first"]) == ({"s": 2.0}, {"s": 90.0})
    assert len(set(seeds)) == 8


def test_an_engine_reads_weights_where_the_folder_has_some(tmp_path: pathlib.Path) -> None:
    given = argparse.Namespace(model=str(tmp_path), quick=True, repeats=3, device="cpu", max_num_batched_tokens=512)
    bench = gpu.Bench(given)
    assert bench.repeats == 1 and bench.options()["load_format"] == "dummy"
    (tmp_path / "model.safetensors").touch()
    assert bench.options()["load_format"] == "auto"


def test_a_model_and_its_4_bit_copy_have_the_same_to_do(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[InstantLLM] = []

    class Opened(InstantLLM):
        def __init__(self, _model: str, **_options: object) -> None:
            super().__init__()
            opened.append(self)
            phases = [SimpleNamespace(phase=name, seconds=2.5) for name in ("load weights", "warm up")]
            self.startup = SimpleNamespace(phases=phases)

        def __enter__(self) -> "Opened":
            return self

        def __exit__(self, *_: object) -> None:
            return

    monkeypatch.setattr(gpu, "LLM", Opened)
    given = argparse.Namespace(model=str(tmp_path), quick=True, repeats=3, device="cpu", max_num_batched_tokens=512)
    bench = gpu.Bench(given)
    measured = [bench.run_four_bits(tmp_path, label) for label in ("bf16", "4 bits")]
    assert all(list(each.step_ms) == [1, 3] and each.load_s == 2.5 for each in measured)
    assert opened[0].calls == opened[1].calls and len(opened[0].calls) == 6  # each once to warm up, once to measure
    assert list(bench.results)[2:4] == ["q4 bf16 prompts", "q4 4 bits 1 requests"]
    assert gpu.Sizes().q4_requests == (1, 8, 32, 64, 256)


def test_fp8_is_asked_for_by_name(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []

    class Opened(InstantLLM):
        def __init__(self, _model: str, **options: object) -> None:
            super().__init__()
            asked.append(options)

        def __enter__(self) -> "Opened":
            return self

        def __exit__(self, *_: object) -> None:
            return

    monkeypatch.setattr(gpu, "LLM", Opened)
    given = argparse.Namespace(model=str(tmp_path), quick=True, repeats=3, device="cpu", max_num_batched_tokens=512)
    bench = gpu.Bench(given)
    bench.run({"W2": functools.partial(gpu.first_token, 8)}, "fp8 ", {"kv_cache_dtype": "fp8"})
    bench.run({"W2": functools.partial(gpu.first_token, 8)})
    assert [options.get("kv_cache_dtype") for options in asked] == ["fp8", None]
    assert list(bench.results) == ["fp8 W2", "W2"]


def test_flash_attn_is_left_out_where_it_cannot_serve(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    given = argparse.Namespace(model=str(tmp_path), quick=True, repeats=3, device="cpu", max_num_batched_tokens=512)
    bench = gpu.Bench(given)
    bench.run_flash_attn(gpu.workloads(gpu.QUICK, [gpu.W1]))
    assert bench.results == {} and "flash_attn: not run, it needs a CUDA device" in capsys.readouterr().out
    assert list(gpu.workloads(gpu.QUICK, [gpu.W1])) == ["W1 mixed"]


def test_the_made_up_tokenizer_has_a_word_for_every_token(tmp_path: pathlib.Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.decode([40000, 40001]) != tokenizer.decode([40001, 40000])
    assert len({tokenizer.decode([token]) for token in range(256, 3000)}) == 3000 - 256
    assert tokenizer.decode([NUM_WORDS - 1]) and cast("int", TINY["vocab_size"]) > NUM_WORDS
