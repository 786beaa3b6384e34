"""How many KV blocks are taken."""

import pathlib

import pytest

from folovllm.common.errors import ConfigError
from folovllm.worker_proc.kv_size import check_fits, decide_num_blocks
from tests.fakes.fake_core import engine_config

MIB = 2**20
GIB = 2**30


def decide(usable: int, per_block: int = MIB, *, is_cpu: bool = True, **options: object) -> int:
    config = engine_config(pathlib.Path("/model"), **{"num_gpu_blocks_override": None} | options)
    return decide_num_blocks(config, per_block, 100, usable, is_cpu=is_cpu)


def test_an_override_is_taken_as_it_is() -> None:
    assert decide(0, num_gpu_blocks_override=77) == 77


def test_a_size_in_gib_is_used_to_the_last_whole_block() -> None:
    assert decide(0, 3 * MIB, kv_cache_memory_gb=1.0) == 341


def test_the_cpu_takes_no_more_than_all_slots_can_fill() -> None:
    assert decide(100 * GIB, max_num_seqs=4) == 4 * 100 + 1


def test_the_cpu_takes_no_more_than_4_gib() -> None:
    assert decide(100 * GIB, max_num_seqs=64) == 4 * 1024


def test_the_cpu_takes_no_more_than_it_may() -> None:
    assert decide(10 * MIB + 1) == 10


def test_a_gpu_takes_all_it_may() -> None:
    assert decide(100 * GIB, max_num_seqs=1, is_cpu=False) == 100 * 1024


@pytest.mark.parametrize(
    ("usable", "options", "message"),
    [
        (MIB, {}, "gpu_memory_utilization leaves room for 1 KV blocks"),
        (-5 * MIB, {}, "gpu_memory_utilization leaves room for 0 KV blocks"),
        (GIB, {"kv_cache_memory_gb": 0.001}, "kv_cache_memory_gb leaves room for 1 KV blocks"),
    ],
)
def test_too_little_is_refused_with_the_options_at_fault(usable: int, options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        decide(usable, MIB, is_cpu=True, kv_cache_memory_gb=options.get("kv_cache_memory_gb"))


def test_more_than_there_is_is_refused() -> None:
    check_fits(GIB, GIB)
    with pytest.raises(ConfigError, match=r"would take 1,025.0 MiB, but only 1,024.0 MiB can be taken"):
        check_fits(GIB + MIB, GIB)
