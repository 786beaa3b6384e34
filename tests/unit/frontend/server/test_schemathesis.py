"""The OpenAPI document and the server agree: bodies made of the document are answered as it says, none with a 500.

Schemathesis makes bodies that the document allows, and bodies that it forbids; the same ones in every run.
"""

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.core.result import Ok
from schemathesis.specs.openapi import checks

from tests.fakes.fake_core_for_frontend import FakeCore
from tests.fakes.http_server import BASE_URL, TIMEOUT_S, Served, served

_CHECKS = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
_EXAMPLES = settings(
    max_examples=15,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
_LONGEST_ERROR = 10_000


class Caller:
    """Sends cases to the application, and looks at the answers."""

    def __init__(self, runner: asyncio.Runner, server: Served) -> None:
        self.statuses: Counter[int] = Counter()
        self._runner = runner
        self._server = server

    def call(self, case: schemathesis.Case[Any]) -> None:
        request: dict[str, Any] = dict(case.as_transport_kwargs(base_url=BASE_URL))
        request.pop("cookies", None)
        if isinstance(request.get("data"), bytes):
            request["content"] = request.pop("data")
        answer = self._runner.run(asyncio.wait_for(self._server.http.request(**request), TIMEOUT_S))
        self.statuses[answer.status_code] += 1
        assert answer.status_code < 500, f"{request} → {answer.text[:2000]}"
        assert answer.status_code < 400 or len(answer.content) < _LONGEST_ERROR
        if not answer.headers["content-type"].startswith("text/event-stream"):
            case.validate_response(answer, checks=_CHECKS)


def each_operation(endpoint: str, mode: GenerationMode, look: Callable[[str, Counter[int]], None]) -> None:
    """Calls every operation with bodies of one kind; `look` sees the statuses of each."""
    with asyncio.Runner() as runner:
        context = served(endpoint)
        server = runner.run(context.__aenter__())
        try:
            document = runner.run(server.http.get("/openapi.json")).json()
            for found in schemathesis.openapi.from_dict(document).get_all_operations():
                assert isinstance(found, Ok), found
                operation = found.ok()
                if mode is GenerationMode.NEGATIVE and operation.method.upper() == "GET":
                    continue  # there is nothing to be wrong
                caller = Caller(runner, server)
                test = given(case=operation.as_strategy(generation_mode=mode))(caller.call)
                _EXAMPLES(test)()
                look(operation.label, caller.statuses)
            assert server.context.num_active == 0
        finally:
            runner.run(context.__aexit__(None, None, None))


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_L26_the_server_keeps_to_its_document(saying: Callable[[str], FakeCore], mode: GenerationMode) -> None:
    seen: dict[str, Counter[int]] = {}
    each_operation(saying("ab").endpoint, mode, seen.__setitem__)
    posts = {label for label in seen if label.startswith("POST")}
    assert len(posts) == 7
    if mode is GenerationMode.POSITIVE:
        assert seen["GET /health"][200] > 0
        assert seen["GET /v1/models/{model}"][404] > 0
    else:
        assert all(seen[label][400] > 0 for label in posts)
