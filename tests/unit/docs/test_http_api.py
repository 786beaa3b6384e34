"""The generated page of the HTTP API: every endpoint, every field, and what each means."""

import msgspec
import pytest

from docs.http_api import all_endpoints, attributes, http_api_page, meaning_of
from folovllm.common.sampling_params import SamplingParams
from folovllm.frontend.server.protocol.chat import ChatMessage, ChatRequest
from folovllm.frontend.server.protocol.completions import CompletionRequest
from folovllm.frontend.server.protocol.responses import ResponsesRequest
from tests.fakes.fake_core_for_frontend import FakeCore
from tests.fakes.http_server import Served, run
from tests.fakes.model_folder import write_model_folder

PAGE = http_api_page()
BODIES = sorted({endpoint.body for endpoint in all_endpoints() if endpoint.body}, key=lambda kind: kind.__name__)


def section(name: str) -> str:
    """What stands below a Struct's heading."""
    return PAGE.partition(f"\n### {name}\n")[2].partition("\n### ")[0]


def test_entries_of_a_docstring() -> None:
    text = "One.\n\nAttributes:\n    a: first\n        goes on.\n    b, c: both.\n\nMore."
    assert attributes(text) == {"a": "first goes on.", "b": "both.", "c": "both."}
    assert attributes("One.") == {}


def test_a_meaning_is_the_structs_own_or_that_of_what_it_extends() -> None:
    assert meaning_of(ChatRequest, "messages") == "the conversation."
    assert meaning_of(ChatRequest, "max_tokens").startswith("most tokens of each answer (the same")
    assert meaning_of(CompletionRequest, "stream").startswith("the answer comes bit by bit")
    assert meaning_of(ChatRequest, "min_p") == attributes(SamplingParams.__doc__ or "")["min_p"]
    assert meaning_of(ChatMessage, "nothing of the kind") == ""


@pytest.mark.parametrize("body", BODIES, ids=lambda kind: kind.__name__)
def test_every_field_of_a_body_has_its_row_and_a_meaning(body: type[msgspec.Struct]) -> None:
    for field in msgspec.structs.fields(body):
        name = f"**`{field.encode_name}`**" if field.required else f"`{field.encode_name}`"
        assert f"\n| {name} | " in section(body.__name__)
        assert meaning_of(body, field.name), f"{body.__name__}.{field.name} has no meaning"


def test_links_lead_to_their_struct() -> None:
    assert "| **`messages`** | [`list[ChatMessage]`](#chatmessage) | the conversation. |" in section("ChatRequest")
    assert PAGE.count("\n### ChatMessage\n") == 1
    assert len(section("TextDeltaEvent")) > 100, "events of streams are described"
    assert "| field | type |\n" in section("TextBlock"), "a table without meanings has no column for them"
    assert set(ResponsesRequest.__struct_fields__) == set(attributes(ResponsesRequest.__doc__ or ""))


def test_the_page_has_the_endpoints_of_a_server(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("http-api")

    async def scenario(server: Served) -> None:
        document = (await server.http.get("/openapi.json")).json()
        told = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
        described = {(method, path) for method, path in told if f"**`{method} {path}`** " in PAGE}
        assert {path for _, path in told - described} >= {"/", "/docs", "/openapi.json"}
        assert all(path in ("/", "/docs", "/openapi.json") or path.startswith("/page/") for _, path in told - described)

    with FakeCore(f"ipc://{folder}/core", model=str(write_model_folder(folder / "tiny"))) as core:
        run(core.endpoint, scenario)
