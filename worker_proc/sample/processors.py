"""Logits processors: functions of the user's own that the engine loads at its start and requests name.

    def processor(logits: Tensor, token_ids: Tensor, num_prompt_tokens: int, argument: Any) -> Tensor

    logits: float32 [V], one request's, after bias and penalties; V is the number of ids that can be sampled.
    token_ids: int64 [n], the request's prompt and answer so far, on the logits' device.
    num_prompt_tokens: how many of them are the prompt.
    argument: what the request gave with the name, as JSON says it; None without one. The same object in every step.

It returns [V], the logits from here on; -inf forbids a token. It must be a pure function: it may be called for tokens
that are dropped, and again after preemption or on another worker. (`logits` and `token_ids` are copies.)

Cost: one call for each request that names it and each of its steps, one after another in the worker's main thread, so
every request of the step waits for all of them; with a GPU, a function that asks the device for a value (`.item()`,
`bool(tensor)`) waits until the device is through with the step. Steps with such requests are not captured graphs.

A function that raises, or returns anything but [V], costs its request alone: the row is left without a token.
"""

import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from folovllm.common.errors import ConfigError
from folovllm.common.log import get_logger
from folovllm.worker_proc.sample.constraints import Precedence, RowTokens

LogitsProcessor = Callable[[torch.Tensor, torch.Tensor, int, Any], torch.Tensor]

logger = get_logger(__name__)


def load_processors(names: Sequence[str]) -> dict[str, LogitsProcessor]:
    """The functions named "module:function", by these names.

    Modules are looked for where Python does, and in the working directory after that.

    Raises:
        ConfigError: one cannot be had; says which, and why.
    """
    if names and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    return {name: _load(name) for name in names}


def _load(name: str) -> LogitsProcessor:
    module_name, _, function_name = name.partition(":")
    if not (module_name and function_name.isidentifier()):
        raise ConfigError(f"logits_processors: {name!r} must have the form 'module:function'")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        cause = f"{type(error).__name__}: {error}"
        hint = f"; sys.path is {sys.path}" if isinstance(error, ModuleNotFoundError) else ""
        raise ConfigError(f"logits_processors: {name!r}: importing {module_name!r} failed: {cause}{hint}") from error
    if function_name not in vars(module):
        raise ConfigError(f"logits_processors: {name!r}: module {module_name!r} has no {function_name!r}")
    return _checked(vars(module)[function_name], name)


def _checked(function: Any, name: str) -> LogitsProcessor:
    if not callable(function):
        raise ConfigError(f"logits_processors: {name!r} is no function but {type(function).__name__}")
    try:
        inspect.signature(function).bind("logits", "token_ids", "num_prompt_tokens", "argument")
    except TypeError as error:
        raise ConfigError(
            f"logits_processors: {name!r} must take (logits, token_ids, num_prompt_tokens, argument): {error}"
        ) from error
    processor: LogitsProcessor = function
    return processor


class Processors:
    """The logits processors of a step's rows."""

    precedence = Precedence.LOGITS_PROCESSORS

    def __init__(
        self,
        calls: Sequence[tuple[int, Sequence[tuple[str, Any]]]],
        tokens: RowTokens,
        loaded: Mapping[str, LogitsProcessor],
    ) -> None:
        """`calls`: (row, its processors as (name, argument) in order)."""
        self._calls = calls
        self._tokens = tokens
        self._loaded = loaded

    def apply(self, logits: torch.Tensor) -> None:
        for row, named in self._calls:
            for name, argument in named:
                try:
                    logits[row] = self._processed(logits[row], row, name, argument)
                except Exception:
                    logger.exception("logits processor %s failed; its request ends", name)
                    logits[row] = -math.inf
                    break

    def _processed(self, logits: torch.Tensor, row: int, name: str, argument: Any) -> torch.Tensor:
        tokens = self._tokens
        known = tokens.token_ids[int(tokens.host_slots[row]), : int(tokens.host_num_known[row])].to(torch.int64)
        result = self._loaded[name](logits.clone(), known, int(tokens.host_num_prompt[row]), argument)
        if not isinstance(result, torch.Tensor):
            raise TypeError(f"it returned a {type(result).__name__}, no tensor")
        if result.shape != logits.shape:
            raise ValueError(f"it returned shape {tuple(result.shape)}, not {tuple(logits.shape)}")
        return result
