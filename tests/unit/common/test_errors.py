"""The tree of exceptions at the head of errors.py is the one that the code has."""

import re

import pytest

from folovllm.common import errors
from folovllm.common.errors import FoloVLLMError, QueueFullError, RequestError

BUILTINS = {"ConfigError": ValueError, "ModelError": ValueError, "RequestError": ValueError}


def test_the_documented_tree_is_the_real_one() -> None:
    documented = set(re.findall(r"\b(\w+Error)\b(?= )", errors.__doc__ or "")) | {"FoloVLLMError"}
    real = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert real == documented - {"ValueError", "RuntimeError"}


@pytest.mark.parametrize("name", [name for name in vars(errors) if name.endswith("Error")])
def test_all_errors_have_one_base(name: str) -> None:
    assert issubclass(vars(errors)[name], FoloVLLMError)


@pytest.mark.parametrize(("name", "builtin"), BUILTINS.items())
def test_wrong_input_is_a_value_error(name: str, builtin: type[Exception]) -> None:
    assert issubclass(vars(errors)[name], builtin)


def test_a_request_error_names_its_field() -> None:
    assert RequestError("x").field is None
    assert RequestError("x", "stop").field == "stop"
    full = QueueFullError("full", 2.5)
    assert (str(full), full.field, full.retry_after_s) == ("full", None, 2.5)
