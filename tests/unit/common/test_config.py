"""Options are checked when they are made; the message names option, value and range."""

import os
import pathlib

import msgspec
import pytest

from folovllm.common.config import (
    EngineConfig,
    api_keys_from_environment,
    cache_dir,
    check_optional_range,
    check_range,
    child_environment,
    default_log_level,
    share_metrics,
)
from folovllm.common.errors import ConfigError


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("dtype", ["float64", "", None]),
        ("device", ["tpu"]),
        ("load_format", ["gguf"]),
        ("scheduling_policy", ["lifo"]),
        ("attention_backend", ["flash"]),
        ("kv_cache_dtype", ["fp4", "float8_e4m3fn"]),
        ("block_size", [0, -1, 1025, 16.0, True, "16", None]),
        ("max_num_seqs", [0, 65537]),
        ("max_num_batched_tokens", [0, 2**24 + 1]),
        ("pipeline_depth", [0, 3]),
        ("max_model_len", [0, 1]),
        ("num_valid_token_ids", [0]),
        ("num_gpu_blocks_override", [1]),
        ("gpu_memory_utilization", [0.0, 1.1, float("nan"), "0.5"]),
        ("kv_cache_memory_gb", [-1.0, float("nan"), float("inf")]),
        ("max_num_queued_reqs", [0]),
        ("max_num_queued_tokens", [0]),
        ("cpu_threads", [0]),
        ("long_prefill_token_threshold", [0, 1.5]),
        ("max_num_partial_prefills", [0]),
        ("target_itl_ms", [0.0, float("nan")]),
        ("enable_prefix_caching", [0, "yes"]),
        ("log_interval_s", [-1.0]),
        ("max_worker_restarts", [-1, 1.0, None]),
        ("seed", [2**63, 0.5]),
        ("log_level", ["loud"]),
    ],
)
def test_wrong_options_are_refused_by_name(option: str, values: list[object]) -> None:
    for value in values:
        with pytest.raises(ConfigError) as caught:
            EngineConfig(model="m", **{option: value})  # type: ignore[arg-type]
        assert option.replace("log_level", "log level") in str(caught.value)
        assert isinstance(caught.value, ValueError)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(TypeError, match="max_num_seq"):
        EngineConfig(model="m", max_num_seq=3)  # type: ignore[call-arg]
    with pytest.raises(msgspec.ValidationError, match="unknown field `x`"):
        msgspec.convert({"model": "m", "x": 1}, EngineConfig)


def test_options_that_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match="max_num_batched_tokens=8 is smaller than max_num_seqs=9"):
        EngineConfig(model="m", max_num_batched_tokens=8, max_num_seqs=9)
    with pytest.raises(ConfigError, match="both set the KV pool's size"):
        EngineConfig(model="m", num_gpu_blocks_override=10, kv_cache_memory_gb=1.0)


def test_options_are_frozen_and_survive_a_round_trip() -> None:
    config = EngineConfig(model="m", dtype="float32", cpu_threads=2, gpu_memory_utilization=1, max_num_queued_tokens=5)
    with pytest.raises(AttributeError):
        config.dtype = "auto"  # type: ignore[misc]
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(config), type=EngineConfig) == config


def test_ranges() -> None:
    check_range("x", 5, 5, 5)
    check_range("x", 1, 0.0, 1.0)
    check_optional_range("x", None, 1, 2)
    with pytest.raises(ConfigError, match=r"x=1.5 must be a whole number"):
        check_range("x", 1.5, 1, 2)
    with pytest.raises(ConfigError, match=r"x=3 is out of range; it must lie between 1 and 2"):
        check_optional_range("x", 3, 1, 2)


def test_the_environment_is_read_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOLOVLLM_CACHE", "~/elsewhere")
    assert cache_dir() == pathlib.Path.home() / "elsewhere"
    monkeypatch.delenv("FOLOVLLM_CACHE")
    assert cache_dir() == pathlib.Path.home() / ".cache" / "folovllm"
    monkeypatch.setenv("FOLOVLLM_LOG_LEVEL", "debug")
    assert default_log_level() == "debug"
    monkeypatch.delenv("FOLOVLLM_LOG_LEVEL")
    assert default_log_level() == "warning"
    monkeypatch.setenv("FOLOVLLM_API_KEYS", " one, ,two ")
    assert api_keys_from_environment() == ("one", "two")
    monkeypatch.delenv("FOLOVLLM_API_KEYS")
    assert api_keys_from_environment() == ()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "")  # so that it is put back
    share_metrics("/a/folder")
    assert os.environ["PROMETHEUS_MULTIPROC_DIR"] == "/a/folder"


def test_a_child_finds_the_package_that_started_it_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/theirs")
    monkeypatch.setenv("KEPT", "yes")
    environment = child_environment("/ours")
    assert (environment["PYTHONPATH"], environment["KEPT"]) == ("/ours:/theirs", "yes")
    monkeypatch.delenv("PYTHONPATH")
    assert child_environment("/ours")["PYTHONPATH"] == "/ours"


def test_threads_of_a_child_spin_briefly_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    assert 1000 < int(child_environment("/ours")["GOMP_SPINCOUNT"]) < 100_000
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert child_environment("/ours")["GOMP_SPINCOUNT"] == "7"


def test_children_get_all_threads_that_they_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_DYNAMIC", "true")
    assert child_environment("/ours")["OMP_DYNAMIC"] == "false"


def test_children_get_huge_pages_unless_the_user_tunes_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert child_environment("/ours")["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=1")
    assert child_environment("/ours")["GLIBC_TUNABLES"] == "glibc.malloc.check=1"
