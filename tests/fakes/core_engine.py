"""A real core process with a fake worker, ready in one line, and what a test asks of it again and again."""

import pathlib
from collections.abc import Iterator
from contextlib import contextmanager

from folovllm.common.config import EngineConfig
from folovllm.common.messages.frontend_core import EngineStats
from folovllm.common.messages.lifecycle import CoreReady
from tests.fakes.fake_frontend import FakeFrontend
from tests.fakes.fake_parent import FakeParent, make_model_dir
from tests.fakes.fake_worker import Script


@contextmanager
def running_core(
    folder: pathlib.Path, script: Script, listen: str = "", **options: object
) -> Iterator[tuple[FakeParent, CoreReady]]:
    model_dir = make_model_dir(folder / "model", script)
    fields: dict[str, object] = {"block_size": 4, "log_level": "warning", **options}
    config = EngineConfig(model=str(model_dir), **fields)  # type: ignore[arg-type]
    with FakeParent() as parent:
        yield parent, parent.start(config, listen)


@contextmanager
def one_frontend(folder: pathlib.Path, script: Script, **options: object) -> Iterator[FakeFrontend]:
    """A core of a test's own and its one frontend."""
    with running_core(folder, script, "", **options) as (parent, _), FakeFrontend(parent.endpoint) as frontend:
        yield frontend


def is_empty(stats: EngineStats) -> bool:
    """Nothing runs or waits, and every block is free."""
    held = (stats.num_running, stats.num_waiting, stats.tokens_in_use, stats.num_blocks - stats.num_free_blocks)
    return held == (0, 0, 0, 0)


def wait_until_empty(frontend: FakeFrontend, num_frontends: int = 1) -> EngineStats:
    """Asks until the engine is empty and has so many frontends; each answer may wait for the core's next Ping."""
    stats = frontend.stats()
    for _ in range(2000):
        if is_empty(stats) and stats.num_frontends == num_frontends:
            break
        frontend.receive()
        stats = frontend.stats()
    assert is_empty(stats), f"the engine does not become empty: {stats}"
    return stats
