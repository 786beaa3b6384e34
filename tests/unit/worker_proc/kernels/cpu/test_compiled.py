"""When kernels are described and compiled, and when their code comes from the cache."""

import ctypes
import pathlib

import numpy as np
import pytest

pytest.importorskip("llvmlite", reason="kernels for the CPU are compiled by llvmlite")

from folovllm.worker_proc.kernels.cpu import compiled
from folovllm.worker_proc.kernels.cpu.code_cache import CodeCache
from folovllm.worker_proc.kernels.cpu.compiled import Compiled, prepare
from folovllm.worker_proc.kernels.cpu.llvm import I64, Kernel


class Described:
    """Descriptions of a kernel that writes a number, counted."""

    def __init__(self) -> None:
        self.numbers: list[int] = []

    def build_number(self, number: int) -> Kernel:
        self.numbers.append(number)
        k = Kernel("number")
        k.store(k.integer(number), k.argument(0), k.integer(0), I64)
        return k


def written_by(code: Compiled) -> int:
    found = np.zeros(1, np.int64)
    arguments = np.array([found.ctypes.data], np.int64)
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(code.address)(arguments.ctypes.data)
    return int(found[0])


@pytest.fixture(autouse=True)
def prepared() -> None:
    prepare()


def test_code_that_is_kept_is_neither_described_nor_compiled_again(tmp_path: pathlib.Path) -> None:
    described, cache = Described(), CodeCache(tmp_path)
    for number in (7, 8, 7, 8):
        assert written_by(Compiled.by(cache, described.build_number, number)) == number
    assert described.numbers == [7, 8]


def test_without_a_cache_it_is_compiled_each_time() -> None:
    described = Described()
    codes = [Compiled.by(None, described.build_number, number) for number in (1, 2, 1)]
    assert [written_by(code) for code in codes] == [1, 2, 1] and described.numbers == [1, 2, 1]
    assert written_by(Compiled(described.build_number(5))) == 5


def test_other_sources_are_other_code(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    described, cache = Described(), CodeCache(tmp_path)
    Compiled.by(cache, described.build_number, 1)
    monkeypatch.setattr(compiled, "_sources", lambda: "others")
    Compiled.by(cache, described.build_number, 1)
    assert described.numbers == [1, 1]


def test_the_hash_of_the_sources_is_one() -> None:
    assert len(compiled._sources()) == 64 and compiled._sources() == compiled._sources()
