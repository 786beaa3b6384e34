"""Code that is kept on disk comes back as it was, or not at all."""

import logging
import os
import pathlib
import resource
import signal
import stat

import pytest

from folovllm.worker_proc.kernels.cpu.code_cache import CodeCache

MADE_FOR = ("text", "cpu", "+avx512f", "0.45")


@pytest.fixture
def cache(tmp_path: pathlib.Path) -> CodeCache:
    return CodeCache(tmp_path / "kernels")


def the_file(tmp_path: pathlib.Path) -> pathlib.Path:
    (path,) = (tmp_path / "kernels").iterdir()
    return path


def test_what_is_kept_is_found_by_another_process(cache: CodeCache, tmp_path: pathlib.Path) -> None:
    assert cache.find(MADE_FOR) is None
    cache.keep(MADE_FOR, b"code")
    assert CodeCache(tmp_path / "kernels").find(MADE_FOR) == b"code"
    cache.keep(MADE_FOR, b"other")
    assert cache.find(MADE_FOR) == b"other"
    assert stat.S_IMODE((tmp_path / "kernels").stat().st_mode) == 0o700
    assert the_file(tmp_path).suffix == ".o"  # and no temporary file beside it


@pytest.mark.parametrize("place", range(len(MADE_FOR)))
def test_another_text_processor_or_version_is_another_file(cache: CodeCache, place: int) -> None:
    cache.keep(MADE_FOR, b"code")
    other = list(MADE_FOR)
    other[place] += "x"
    assert cache.find(other) is None


def test_borders_between_the_texts_count(cache: CodeCache) -> None:
    cache.keep(("ab", "c"), b"code")
    assert cache.find(("a", "bc")) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[:10],
        lambda content: b"",
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),
        lambda content: b"folovllm kernel 0\n" + content[18:],
        lambda content: content + b"x",
    ],
)
def test_a_damaged_file_counts_as_missing_and_is_replaced(
    cache: CodeCache, tmp_path: pathlib.Path, damage: object, caplog: pytest.LogCaptureFixture
) -> None:
    assert callable(damage)
    cache.keep(MADE_FOR, b"machine code")
    path = the_file(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level(logging.WARNING, logger="folovllm"):
        assert cache.find(MADE_FOR) is None
    assert "is damaged" in caplog.text
    cache.keep(MADE_FOR, b"machine code")
    assert cache.find(MADE_FOR) == b"machine code"


def test_a_folder_that_cannot_be_made_or_read_costs_only_time(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"")
    cache = CodeCache(tmp_path / "file" / "kernels")
    with caplog.at_level(logging.WARNING, logger="folovllm"):
        cache.keep(MADE_FOR, b"code")
        assert cache.find(MADE_FOR) is None
    assert "cannot be kept" in caplog.text and "cannot be read" in caplog.text


def test_a_full_disk_leaves_no_part_of_a_file(
    cache: CodeCache, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that write fails, as it does on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with caplog.at_level(logging.WARNING, logger="folovllm"):
            cache.keep(MADE_FOR, bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert "cannot be kept" in caplog.text
    assert list((tmp_path / "kernels").iterdir()) == []


def test_many_writers_leave_one_whole_file(cache: CodeCache, tmp_path: pathlib.Path) -> None:
    children = []
    for number in range(4):
        child = os.fork()
        if child == 0:
            for _ in range(20):
                cache.keep(MADE_FOR, bytes([number]) * 10_000)
            os._exit(0)
        children.append(child)
    seen = [cache.find(MADE_FOR) for _ in range(50)]
    assert all(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 for child in children)
    assert all(code is None or (len(set(code)) == 1 and len(code) == 10_000) for code in seen)
    assert the_file(tmp_path).exists()
