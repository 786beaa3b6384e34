"""The page's files and what its inspector asks for, over a fake core."""

import re

import pytest

from folovllm.frontend.server.page_files import PAGE_PATHS
from tests.fakes.fake_core_for_frontend import FakeCore
from tests.fakes.http_server import Served, run
from tests.sources import ROOT

FOLDER = ROOT / "frontend/server/page"


def test_every_file_of_the_folder_is_served(core: FakeCore) -> None:
    async def scenario(server: Served) -> None:
        for path, name in PAGE_PATHS.items():
            answer = await server.http.get(path)
            assert (answer.status_code, answer.content) == (200, (FOLDER / name).read_bytes())
            assert answer.headers["Content-Security-Policy"].startswith("default-src 'self'")
            assert answer.headers["Cache-Control"] == "no-cache"
        types = {(await server.http.get(path)).headers["Content-Type"] for path in PAGE_PATHS}
        assert types == {
            f"{kind}; charset=utf-8" for kind in ("text/html", "text/css", "text/javascript", "image/svg+xml")
        }

    assert sorted(PAGE_PATHS.values()) == sorted(file.name for file in FOLDER.iterdir())
    run(core.endpoint, scenario, api_keys=("key",))


def test_the_page_names_its_own_files_only() -> None:
    for file in FOLDER.iterdir():
        text = file.read_text()
        named = re.findall(r'(?:src|href)="(?!https?:)([^"]+)"', text) if file.suffix == ".html" else []
        named += [f"page/{name}" for name in re.findall(r'from "\./([^"]+)"', text)]
        assert {f"/{name}" for name in named} <= PAGE_PATHS.keys() | {"/docs"}
        assert not re.search(r"(?:src|href|from|import|url)\W{1,3}https?:", text), file.name


def test_the_engine_from_inside(core: FakeCore) -> None:
    async def scenario(server: Served) -> None:
        state = (await server.http.get("/inspector/state")).json()
        assert state["blocks"] == "0123"
        assert state["block_stride"] == 25
        assert (state["requests"], state["steps"]) == ([], [])
        assert state["stats"]["num_blocks"] == 100
        assert "ticket" not in state["stats"]
        facts = state["engine"]
        assert (facts["model"], facts["device"], facts["block_size"]) == ("tiny", "fake", 16)
        assert facts["max_num_batched_tokens"] == 64

    run(core.endpoint, scenario)


@pytest.mark.parametrize("headers, status", [({}, 401), ({"X-Api-Key": "key"}, 200)])
def test_what_the_inspector_asks_for_needs_a_key(core: FakeCore, headers: dict[str, str], status: int) -> None:
    async def scenario(server: Served) -> None:
        assert (await server.http.get("/inspector/state", headers=headers)).status_code == status

    run(core.endpoint, scenario, api_keys=("key",))
