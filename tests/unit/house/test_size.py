"""How long functions and files may be. Branches and parameters are counted by ruff (C901, PLR0912, PLR0913)."""

import re

import pytest

from tests.sources import Function, SourceFile, source_files

MAX_FUNCTION_LINES = 50
MAX_FILE_LINES = 500
HALF_OF_FUNCTIONS_LINES = 10
MAX_EXCEPTIONS = 8

# Functions that may be longer, or have more branches or parameters: name -> why splitting them would be worse.
_KERNEL = "a kernel: a third of its lines are parameters, and values in registers pass no border"
EXCEPTIONS: dict[str, str] = {
    "worker_proc/kernels/triton/int4_gemm.py:_int4_gemm": _KERNEL,
    "worker_proc/kernels/triton/int4_gemv.py:_int4_gemv": _KERNEL,
    "worker_proc/kernels/triton/paged_decode.py:_paged_decode": _KERNEL,
    "worker_proc/kernels/triton/paged_prefill.py:_paged_prefill": _KERNEL,
    "worker_proc/kernels/triton/sampling.py:_find_thresholds": _KERNEL,
    "worker_proc/kernels/triton/sampling.py:_pick": _KERNEL,
    "worker_proc/kernels/triton/skinny_gemm.py:_skinny_gemm": _KERNEL,
}

_SIZE_RULE_IGNORED = re.compile(r"#\s*noqa:.*\b(C901|PLR0912)\b")

EXAMPLE = '''"""Header."""

import os

def outer(a, b):
    """Two

    lines."""
    # why
    text = """not a
    docstring"""

    def inner():
        return os
    return inner  # trailing


class A:
    """Doc."""

    async def m(self):
        return 1
'''


def _functions() -> list[Function]:
    return [function for file in source_files() for function in file.functions()]


def test_code_lines_leave_out_docstrings_comments_and_blanks() -> None:
    file = SourceFile("common/example.py", EXAMPLE)
    assert len(file.code_lines) == 10
    assert [(function.name, function.code_lines) for function in file.functions()] == [
        ("common/example.py:outer", 6),
        ("common/example.py:outer.inner", 2),
        ("common/example.py:A.m", 2),
    ]


def test_functions_fit_on_a_screen() -> None:
    too_long = {
        function.name: function.code_lines
        for function in _functions()
        if function.code_lines > MAX_FUNCTION_LINES and function.name not in EXCEPTIONS
    }
    assert not too_long


def test_half_of_the_functions_are_short() -> None:
    functions = _functions()
    short = sum(function.code_lines <= HALF_OF_FUNCTIONS_LINES for function in functions)
    assert 2 * short >= len(functions), f"{short} of {len(functions)} functions have at most 10 code lines"


def test_files_stay_below_the_hard_limit() -> None:
    too_long = {file.name: len(file.code_lines) for file in source_files() if len(file.code_lines) > MAX_FILE_LINES}
    assert not too_long


def test_exceptions_are_few_and_explained() -> None:
    assert len(EXCEPTIONS) <= MAX_EXCEPTIONS
    assert all(len(reason) > 20 for reason in EXCEPTIONS.values())
    stale = set(EXCEPTIONS) - {function.name for function in _functions()}
    assert not stale, f"no longer there: {stale}"


def test_whoever_switches_a_branch_rule_off_is_listed() -> None:
    unlisted = [
        function.name
        for file in source_files()
        for function in file.functions()
        if _SIZE_RULE_IGNORED.search(file.text.splitlines()[function.node.lineno - 1])
        and function.name not in EXCEPTIONS
    ]
    assert not unlisted


@pytest.mark.parametrize("line", ["def f():  # noqa: C901", "def f():  # noqa: S110, PLR0912 - why"])
def test_switched_off_rules_are_recognised(line: str) -> None:
    assert _SIZE_RULE_IGNORED.search(line)
