"""No collections while a process imports what it keeps."""

import gc
import subprocess
import sys
from collections.abc import Iterator

import pytest

from folovllm.common.kept_imports import kept_imports


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    """What the tests freeze is the test process's own."""
    yield
    gc.unfreeze()


def test_nothing_is_collected_inside_and_what_is_there_is_left_alone_after() -> None:
    with kept_imports():
        assert not gc.isenabled()
        frozen_before = gc.get_freeze_count()
    assert gc.isenabled()
    assert gc.get_freeze_count() > frozen_before


def test_an_import_that_fails_turns_collections_on_again() -> None:
    with pytest.raises(ImportError), kept_imports():
        raise ImportError("no such module")
    assert gc.isenabled()


def test_it_loads_little_itself() -> None:
    program = "import sys; import folovllm.common.kept_imports; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=30)
    assert not {"torch", "zmq", "msgspec", "numpy"} & set(done.stdout.split())
