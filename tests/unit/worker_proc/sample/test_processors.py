"""Logits processors: loading, with errors that say what is wrong; and calling, where a failure costs one row."""

import logging
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from folovllm.common.errors import ConfigError
from folovllm.worker_proc.sample.processors import LogitsProcessor, Processors, load_processors
from tests.fakes.row_tokens import row_tokens

NUM_COLUMNS = 6
_MODULE = """
from functools import partial

def boost(logits, token_ids, num_prompt_tokens, argument):
    return logits + argument

def short(logits, token_ids):
    return logits

def renamed(a, b, c, d=None, *rest):
    return a

bound = partial(boost, argument=1)
number = 5
"""


@pytest.fixture
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A working directory with modules in it."""
    (tmp_path / "mine_processors.py").write_text(_MODULE)
    (tmp_path / "mine_broken.py").write_text("raise ValueError('not today')")
    (tmp_path / "mine_needs.py").write_text("import module_that_is_not_there")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


@pytest.mark.usefixtures("folder")
def test_functions_are_loaded_from_the_working_directory_too() -> None:
    loaded = load_processors(["mine_processors:boost", "mine_processors:renamed"])
    assert list(loaded) == ["mine_processors:boost", "mine_processors:renamed"]
    assert loaded["mine_processors:boost"](torch.zeros(2), torch.zeros(1), 1, 3).tolist() == [3, 3]
    assert load_processors([]) == {}


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine_processors", "'mine_processors' must have the form 'module:function'"),
        (":boost", "must have the form"),
        ("mine_processors:", "must have the form"),
        ("mine_processors:a.b", "must have the form"),
        ("mine_absent:boost", "importing 'mine_absent' failed: ModuleNotFoundError.*sys.path is"),
        ("mine_needs:boost", "importing 'mine_needs' failed: ModuleNotFoundError: .*module_that_is_not_there"),
        ("mine_broken:boost", "importing 'mine_broken' failed: ValueError: not today"),
        ("mine_processors:absent", "module 'mine_processors' has no 'absent'"),
        ("mine_processors:number", "is no function but int"),
        ("mine_processors:short", r"must take \(logits, token_ids, num_prompt_tokens, argument\): too many"),
        ("mine_processors:bound", "must take .*: too many"),
    ],
)
def test_what_cannot_be_loaded_is_told_at_the_start(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_processors(["mine_processors:boost", name])


def add(logits: torch.Tensor, token_ids: torch.Tensor, num_prompt_tokens: int, argument: Any) -> torch.Tensor:
    added: torch.Tensor = logits + argument
    return added


def double(logits: torch.Tensor, token_ids: torch.Tensor, num_prompt_tokens: int, argument: Any) -> torch.Tensor:
    return logits.mul_(2)


def look(logits: torch.Tensor, token_ids: torch.Tensor, num_prompt_tokens: int, argument: Any) -> torch.Tensor:
    """Puts what it was given where it can be read."""
    seen = [float(len(token_ids)), float(token_ids[-1]), float(num_prompt_tokens), float(argument is None)]
    token_ids.zero_()
    return torch.tensor([*seen, 0.0, 0.0])


def fail(logits: torch.Tensor, token_ids: torch.Tensor, num_prompt_tokens: int, argument: Any) -> Any:
    """Breaks in the way that the argument says."""
    logits.fill_(99.0)
    match argument:
        case "raise":
            raise KeyError("oops")
        case "shape":
            return logits[:-1]
        case "type":
            return logits.tolist()
    return None


LOADED: Mapping[str, LogitsProcessor] = {"add": add, "double": double, "look": look, "fail": fail}


def apply(calls: list[tuple[int, list[tuple[str, Any]]]]) -> torch.Tensor:
    tokens = row_tokens([[1, 2], [3], [4]], [[5], [], [7, 8]])
    before = tokens.token_ids.clone()
    logits = torch.ones(3, NUM_COLUMNS)
    Processors(calls, tokens, LOADED).apply(logits)
    assert torch.equal(tokens.token_ids, before), "a processor gets a copy"
    return logits


def test_processors_run_in_the_order_of_their_request_on_its_row_alone() -> None:
    logits = apply([(0, [("add", 3), ("double", None)]), (2, [("double", None), ("add", 3)])])
    assert logits.tolist() == [[8.0] * NUM_COLUMNS, [1.0] * NUM_COLUMNS, [5.0] * NUM_COLUMNS]


def test_a_processor_sees_prompt_and_answer_and_its_argument() -> None:
    logits = apply([(0, [("look", None)]), (1, [("look", 0)]), (2, [("look", [])])])
    assert logits[:, :4].tolist() == [[3, 5, 2, 1], [1, 3, 1, 0], [3, 8, 1, 0]]


@pytest.mark.parametrize(
    ("argument", "cause"),
    [
        ("raise", "KeyError: 'oops'"),
        ("shape", "it returned shape (5,), not (6,)"),
        ("type", "it returned a list, no tensor"),
        ("none", "it returned a NoneType, no tensor"),
    ],
)
def test_a_failure_leaves_its_row_without_a_token_and_no_other(
    argument: str, cause: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        logits = apply([(0, [("add", 1)]), (1, [("fail", argument), ("add", 1)]), (2, [("add", 2)])])
    assert logits.tolist() == [[2.0] * NUM_COLUMNS, [-torch.inf] * NUM_COLUMNS, [3.0] * NUM_COLUMNS]
    (record,) = caplog.records
    assert record.getMessage() == "logits processor fail failed; its request ends"
    assert record.exc_info is not None
    assert cause in f"{type(record.exc_info[1]).__name__}: {record.exc_info[1]}"


def test_an_unknown_name_costs_its_row_alone() -> None:
    logits = apply([(1, [("absent", None)])])
    assert logits.tolist() == [[1.0] * NUM_COLUMNS, [-torch.inf] * NUM_COLUMNS, [1.0] * NUM_COLUMNS]
