"""Decision modules are free of I/O: time is an argument, sockets are somebody else's; and each has its own tests."""

import pytest

from tests.sources import ROOT, SourceFile, load
from tests.unit.house import rules

NO_IO = ("zmq", "asyncio", "time", "datetime", "socket", "selectors", "threading", "subprocess")

# Those that the engine cannot be without; a renamed one must not slip out of the rule.
PRESENT = (
    "core_proc/scheduler.py",
    "core_proc/block_pool.py",
    "core_proc/kv_cache_manager.py",
    "core_proc/request_queue.py",
    "core_proc/request.py",
    "core_proc/deadlines.py",
    "core_proc/state_log.py",
    "core_proc/supervisor.py",
    "core_proc/isolation.py",
    "frontend/detokenizer.py",
)
# Those that may come later.
PLANNED = ("core_proc/block_hash.py", "core_proc/step_time.py")


def _decision_modules() -> list[str]:
    return [*PRESENT, *(name for name in PLANNED if (ROOT / name).exists())]


def test_the_rule_sees_every_form_of_import() -> None:
    code = "import time\nimport zmq.asyncio\nfrom time import monotonic\ndef f():\n    import socket\nimport timeit"
    found = rules.forbidden_imports(SourceFile("core_proc/example.py", code), NO_IO)
    assert [line.split(": ")[1] for line in found] == ["time", "zmq.asyncio", "time.monotonic", "socket"]


@pytest.mark.parametrize("name", _decision_modules())
def test_decision_module_does_no_io(name: str) -> None:
    assert not rules.forbidden_imports(load(ROOT / name), NO_IO)


@pytest.mark.parametrize("name", _decision_modules())
def test_decision_module_has_at_least_as_many_test_lines(name: str) -> None:
    room, module = name.split("/")
    tests = sorted((ROOT / "tests" / "unit" / room).glob(f"test_{module.removesuffix('.py')}*.py"))
    assert tests, f"tests/unit/{room}/test_{module} is missing"
    test_lines = sum(len(load(path).code_lines) for path in tests)
    assert test_lines >= len(load(ROOT / name).code_lines)
