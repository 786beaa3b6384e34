import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from folovllm.common.errors import ModelError, RequestError
from folovllm.frontend.tokenizer import Tokenizer
from tests.fakes.tokenizers_ import (
    byte_level_backend,
    case_tokenizer,
    llama3_like_backend,
    sentencepiece_like_tokenizer,
)

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "In 2024, 3.14159 × 1000000 = 3141590",
    "你好，世界！龘是一个很复杂的字 42",
    "🦜🦜 and 👩‍👩‍👧‍👦 and 🇫🇷",
    "def f(x: int) -> int:\n    return x**2  # squared\n\n\tif x:\r\n\t\tpass",
    "  leading, trailing and   inner blanks  \n\n\n",
    "I'm sure they'd say WE'LL DON'T",
    "<|im_start|>user\nhi<|im_end|>\n<think>x</think>",
    "naïve cafe\u0301 Ångström ﬁ",
    "\x00\x01\x7f\u00ad\u200b\ufeff",
    "Привет, мир! مرحبا בעולם नमस्ते",
]
SMALL = case_tokenizer()


@pytest.mark.parametrize("text", TEXTS)
def test_qwen3_ids_equal_transformers(
    qwen3_tokenizer: Tokenizer, qwen3_tokenizer_dir: Path, text: str, oracles: dict[Path, AutoTokenizer]
) -> None:
    oracle = _oracle(oracles, qwen3_tokenizer_dir)
    assert qwen3_tokenizer.encode(text) == oracle.encode(text)
    assert qwen3_tokenizer.decode(oracle.encode(text), False) == oracle.decode(oracle.encode(text))


@pytest.mark.parametrize("text", TEXTS)
def test_demo_ids_equal_transformers(
    demo_tokenizer: Tokenizer, demo_model_dir: Path, text: str, oracles: dict[Path, AutoTokenizer]
) -> None:
    oracle = _oracle(oracles, demo_model_dir)
    ids = demo_tokenizer.encode(text)
    assert ids == oracle.encode(text)
    for skip in (True, False):
        assert demo_tokenizer.decode(ids, skip) == oracle.decode(ids, skip_special_tokens=skip)


@pytest.fixture(scope="module")
def oracles() -> dict[Path, AutoTokenizer]:
    return {}


def _oracle(oracles: dict[Path, AutoTokenizer], folder: Path) -> AutoTokenizer:
    if folder not in oracles:
        oracles[folder] = AutoTokenizer.from_pretrained(folder)
    return oracles[folder]


def test_qwen3_bounds_and_names(qwen3_tokenizer: Tokenizer) -> None:
    assert qwen3_tokenizer.num_ids == len(qwen3_tokenizer) == 151_669
    assert qwen3_tokenizer.vocab_size == 151_643
    assert (qwen3_tokenizer.eos_token_id, qwen3_tokenizer.pad_token_id) == (151_645, 151_643)
    assert qwen3_tokenizer.bos_token_id is None
    assert qwen3_tokenizer.byte_level
    assert qwen3_tokenizer.is_special(151_645)
    assert not qwen3_tokenizer.is_special(151_667)
    assert qwen3_tokenizer.chat_template is not None


def test_demo_bounds_and_names(demo_tokenizer: Tokenizer) -> None:
    assert demo_tokenizer.num_ids == len(demo_tokenizer) == 49_152
    assert (demo_tokenizer.bos_token_id, demo_tokenizer.eos_token_id, demo_tokenizer.pad_token_id) == (1, 2, 2)
    assert demo_tokenizer.special_tokens["unk_token"] == "<|endoftext|>"
    assert demo_tokenizer.byte_level
    assert demo_tokenizer.convert_ids_to_tokens(demo_tokenizer.encode("Hello world")) == ["Hello", "Ġworld"]


def test_num_ids_bounds_ids_with_gaps() -> None:
    assert SMALL.num_ids == 151_669
    assert len(SMALL) < SMALL.num_ids
    assert SMALL.convert_ids_to_tokens([5370, 151_668, 999_999]) == ["JSON", "</think>", None]


def _save(folder: Path, backend_json: str, config: dict[str, object] | None = None) -> Path:
    (folder / "tokenizer.json").write_text(backend_json, encoding="utf-8")
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.parametrize("extra", [{}, {"add_bos_token": False}, {"add_bos_token": True}])
def test_llama3_puts_bos_in_front_and_the_config_field_changes_nothing(tmp_path: Path, extra: dict[str, bool]) -> None:
    config: dict[str, object] = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", **extra}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    folder = _save(tmp_path, llama3_like_backend().to_str(), config)
    tokenizer, oracle = Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)
    assert tokenizer.encode("hi")[0] == tokenizer.bos_token_id == 256
    assert tokenizer.encode("hi") == oracle.encode("hi")
    assert tokenizer.encode("hi", add_special_tokens=False) == oracle.encode("hi", add_special_tokens=False)
    assert len(tokenizer.encode("hi", add_special_tokens=False)) == 2


def test_tokens_known_to_the_config_alone_are_added(tmp_path: Path) -> None:
    vocab = {chr(ord("a") + i): i for i in range(26)}
    added = {
        "26": {"content": "<a>", "special": False, "normalized": False},
        "27": {"content": "<s>", "special": True, "normalized": False},
    }
    config = {"added_tokens_decoder": added, "bos_token": "<s>", "eos_token": "<e>"}
    folder = _save(tmp_path, byte_level_backend(vocab).to_str(), {**config, "tokenizer_class": "TokenizersBackend"})
    tokenizer, oracle = Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)
    assert tokenizer.encode("<s>hi<a><e>") == oracle.encode("<s>hi<a><e>") == [27, 7, 8, 26, 28]
    assert tokenizer.decode([27, 7, 26, 28]) == "h<a>"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.num_ids) == (27, 28, 29)
    assert tokenizer.special_token_ids == {"<s>": 27, "<e>": 28}


def test_older_folders_name_special_tokens_in_a_file_of_their_own(tmp_path: Path) -> None:
    _save(tmp_path, llama3_like_backend().to_str())
    names = {"bos_token": {"content": "<|begin_of_text|>"}, "eos_token": "<|end_of_text|>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names), encoding="utf-8")
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 257, None)
    assert tokenizer.chat_template is None


def test_truncation_and_padding_in_the_file_do_not_apply(tmp_path: Path) -> None:
    backend = llama3_like_backend()
    backend.enable_truncation(max_length=4)
    backend.enable_padding(length=4)
    tokenizer = Tokenizer.from_folder(_save(tmp_path, backend.to_str()))
    assert len(tokenizer.encode("abcdef")) == 7
    assert len(tokenizer.encode("a")) == 2


def test_chat_templates_from_config_list_and_file(tmp_path: Path) -> None:
    listed = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    _save(tmp_path, llama3_like_backend().to_str(), {"chat_template": listed})
    assert Tokenizer.from_folder(tmp_path).chat_templates == {"default": "D", "tool_use": "T"}
    (tmp_path / "chat_template.jinja").write_text("from the file ü", encoding="utf-8")
    assert Tokenizer.from_folder(tmp_path).chat_template == "from the file ü"


def test_a_folder_without_tokenizer_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ModelError, match=r"sentencepiece tokenizer\.model, which is not supported: convert"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"version": "1.0"}'])
def test_a_broken_tokenizer_json_is_named(tmp_path: Path, content: str) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.from_folder(_save(tmp_path, content))


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_broken_tokenizer_config_is_named(tmp_path: Path, content: str) -> None:
    _save(tmp_path, llama3_like_backend().to_str())
    (tmp_path / "tokenizer_config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ModelError, match=r"tokenizer_config\.json"):
        Tokenizer.from_folder(tmp_path)


def test_a_lone_surrogate_is_refused_with_its_place() -> None:
    with pytest.raises(RequestError, match=r"lone surrogate \(U\+D800 at position 2\)") as caught:
        SMALL.encode("hi\ud800")
    assert caught.value.field == "prompt"


def test_a_prompt_that_is_no_string_is_refused() -> None:
    with pytest.raises(RequestError, match="must be a string, not bytes"):
        SMALL.encode(b"hi")  # type: ignore[arg-type]


def test_sentencepiece_like_decoders_are_not_taken_for_byte_level() -> None:
    assert not sentencepiece_like_tokenizer().byte_level
    assert SMALL.byte_level


def test_bytes_of_tokens() -> None:
    assert SMALL.token_bytes(123918) == "🦜".encode()[:3]
    assert SMALL.token_bytes(151667) == b"<think>"
    assert SMALL.token_bytes(220) == b" "
    assert SMALL.token_bytes(777) == SMALL.token_bytes(-1) == SMALL.token_bytes(10**9) == b""


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 49_151), max_size=20))
def test_bytes_of_tokens_join_to_the_decoded_text(demo_tokenizer: Tokenizer, ids: list[int]) -> None:
    joined = b"".join(map(demo_tokenizer.token_bytes, ids))
    assert joined.decode("utf-8", errors="replace") == demo_tokenizer.decode(ids, skip_special_tokens=False)


def test_a_fork_after_encoding_prints_no_warning(demo_model_dir: Path) -> None:
    """The library warns when a process forks after it used threads; encoding single texts must use none."""
    program = (
        "import os, pathlib, sys; from folovllm.frontend.tokenizer import Tokenizer; "
        "t = Tokenizer.from_folder(pathlib.Path(sys.argv[1])); t.decode(t.encode('a b ' * 1000)); "
        "pid = os.fork(); pid or os._exit(0); os.waitpid(pid, 0); print('done')"
    )
    root = Path(__file__).parents[3]
    environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    command = [sys.executable, "-c", program, str(demo_model_dir)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=root, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
