import math
import os
import pathlib

import pytest
import torch

from folovllm.common.errors import ConfigError
from folovllm.worker_proc import device as device_module
from folovllm.worker_proc.device import (
    Placement,
    available_memory,
    cgroup_cpu_quota,
    cgroup_memory_left,
    choose_device,
    describe_device,
    dtype_name,
    meminfo_available,
    physical_core,
    place,
    resolve_dtype,
    set_threads,
    usable_threads,
)


def write(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def test_choose_device() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    if torch.cuda.is_available():
        assert choose_device("auto").type == choose_device("cuda").type == "cuda"
        return
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(ConfigError, match="device='cuda' was asked for, but torch"):
        choose_device("cuda")


def test_resolve_dtype() -> None:
    assert resolve_dtype("auto", "bfloat16") is torch.bfloat16
    assert resolve_dtype("auto", None) is torch.float32
    assert resolve_dtype("float16", "bfloat16") is torch.float16
    assert dtype_name(torch.float16) == "float16"
    with pytest.raises(ConfigError, match="dtype='int8' is not known; choose one of auto, bfloat16"):
        resolve_dtype("int8", None)


def test_describe_device() -> None:
    threads = torch.get_num_threads()
    try:
        set_threads(1)
        assert describe_device(torch.device("cpu")) == "cpu (1 thread)"
        assert set_threads(2) == 2
        assert describe_device(torch.device("cpu")) == "cpu (2 threads)"
        assert set_threads(None) == usable_threads()
    finally:
        torch.set_num_threads(threads)


def test_available_memory_is_within_the_machines() -> None:
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < available_memory(torch.device("cpu")) <= physical


def test_meminfo(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "meminfo", "MemTotal:  100 kB\nMemAvailable:   64 kB")
    assert meminfo_available(tmp_path / "meminfo") == 65536
    write(tmp_path / "meminfo", "MemTotal:  100 kB")
    with pytest.raises(OSError, match="no MemAvailable"):
        meminfo_available(tmp_path / "meminfo")


def test_cgroup_v2_memory_takes_the_strictest_ancestor(tmp_path: pathlib.Path) -> None:
    assert cgroup_memory_left(tmp_path, "/a/b") == 2**60
    write(tmp_path / "a" / "memory.max", "1000")
    write(tmp_path / "a" / "memory.current", "700")
    write(tmp_path / "a" / "memory.stat", "anon 5\ninactive_file 100")
    write(tmp_path / "a" / "b" / "memory.max", "max")
    write(tmp_path / "a" / "b" / "memory.current", "600")
    assert cgroup_memory_left(tmp_path, "/a/b") == 400
    write(tmp_path / "a" / "b" / "memory.max", "500")
    assert cgroup_memory_left(tmp_path, "/a/b") == 0
    assert cgroup_memory_left(tmp_path, "/a/not-visible-here") == 400


def test_cgroup_v1_memory(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "memory" / "x" / "memory.limit_in_bytes", "1000")
    write(tmp_path / "memory" / "x" / "memory.usage_in_bytes", "900")
    write(tmp_path / "memory" / "memory.limit_in_bytes", str(2**63 - 4096))
    assert cgroup_memory_left(tmp_path, "/x") == 100


def test_cpu_quota(tmp_path: pathlib.Path) -> None:
    assert cgroup_cpu_quota(tmp_path, "/a") == math.inf
    write(tmp_path / "a" / "cpu.max", "max 100000")
    assert cgroup_cpu_quota(tmp_path, "/a") == math.inf
    write(tmp_path / "a" / "cpu.max", "150000 100000")
    assert cgroup_cpu_quota(tmp_path, "/a") == 1.5
    write(tmp_path / "cpu" / "a" / "cpu.cfs_quota_us", "100000")
    write(tmp_path / "cpu" / "a" / "cpu.cfs_period_us", "100000")
    assert cgroup_cpu_quota(tmp_path, "/a") == 1.0
    write(tmp_path / "cpu" / "a" / "cpu.cfs_quota_us", "-1")
    assert cgroup_cpu_quota(tmp_path, "/a") == 1.5


def test_hyperthreads_share_a_core(tmp_path: pathlib.Path) -> None:
    for cpu in (0, 4):
        write(tmp_path / f"cpu{cpu}" / "topology" / "thread_siblings_list", "0,4")
    assert physical_core(0, tmp_path) == physical_core(4, tmp_path) == "0,4"
    assert physical_core(1, tmp_path) == "1"


@pytest.mark.parametrize(("quota", "threads"), [(math.inf, None), (1.0, 1), (0.3, 1)])
def test_usable_threads(monkeypatch: pytest.MonkeyPatch, quota: float, threads: int | None) -> None:
    monkeypatch.setattr(device_module, "cgroup_cpu_quota", lambda root, group: quota)
    allowed = len(os.sched_getaffinity(0))
    assert 1 <= usable_threads() <= allowed
    if threads is not None:
        assert usable_threads() == threads


def test_the_cpu_has_no_triton_layers() -> None:
    placement = place(torch.device("cpu"), torch.bfloat16)
    assert placement == Placement(torch.device("cpu"), torch.bfloat16, use_triton=False, dependent_launch=False)
