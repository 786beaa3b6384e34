"""A run as a picture: that a file comes out, and what is said where none can."""

import pathlib
import sys

import pytest

from folovllm.common.errors import ConfigError
from folovllm.frontend.trace_plot import save_picture
from folovllm.frontend.trace_view import TraceView, build_view
from tests.fakes.traced_engine import HEADER, TracedEngine


@pytest.fixture(scope="module")
def view() -> TraceView:
    """Chunks, a cached beginning, a fork, a preemption."""
    engine = TracedEngine(num_blocks=8, max_num_seqs=3, max_num_batched_tokens=12, depth=2)
    engine.add(8, max_tokens=1)
    engine.run()
    engine.add([(i * i) % 97 for i in range(8)], n=2, max_tokens=14)
    engine.add(7, max_tokens=14)
    engine.run()
    view = build_view(HEADER, engine.records)
    assert view.totals.num_preemptions
    assert view.totals.num_cached_tokens
    return view


@pytest.mark.parametrize(("name", "begin"), [("run.png", b"\x89PNG"), ("run.svg", b"<?xml")])
def test_the_files_ending_says_what_is_made(tmp_path: pathlib.Path, view: TraceView, name: str, begin: bytes) -> None:
    save_picture(view, tmp_path / name)
    content = (tmp_path / name).read_bytes()
    assert content.startswith(begin)
    assert len(content) > 5000


def test_what_cannot_be_written_is_said(tmp_path: pathlib.Path, view: TraceView) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        save_picture(view, tmp_path / "gone" / "run.png")
    with pytest.raises(ConfigError, match="cannot be written"):
        save_picture(view, tmp_path / "run.nonsense")
    with pytest.raises(ConfigError, match="nothing to draw"):
        save_picture(build_view(HEADER, []), tmp_path / "run.png")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_it_is_said_how_to_get_it(
    tmp_path: pathlib.Path, view: TraceView, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'folovllm\[plots\]'"):
        save_picture(view, tmp_path / "run.png")
