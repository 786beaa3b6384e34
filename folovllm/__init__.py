"""FoloVLLM, an LLM inference engine in three kinds of process.

    from folovllm import LLM, SamplingParams

    with LLM("demo") as llm:
        print(llm.generate("The capital of France is", SamplingParams(max_tokens=8))[0].outputs[0].text)

Importing this package loads the standard library only; each name below loads its module when it is first used.
"""

import importlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from folovllm.common.errors import (
        ConfigError,
        EngineDeadError,
        EngineStartError,
        FoloVLLMError,
        ModelError,
        RequestError,
        RequestFailedError,
    )
    from folovllm.common.sampling_params import SamplingParams
    from folovllm.common.structured_outputs import StructuredOutputsParams
    from folovllm.frontend.async_llm import AsyncLLM
    from folovllm.frontend.llm import LLM
    from folovllm.frontend.outputs import CompletionOutput, Logprob, RequestOutput

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "ConfigError",
    "EngineDeadError",
    "EngineStartError",
    "FoloVLLMError",
    "Logprob",
    "ModelError",
    "RequestError",
    "RequestFailedError",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "__version__",
]

_ERRORS = "folovllm.common.errors"
_HOME_OF = {
    "LLM": "folovllm.frontend.llm",
    "AsyncLLM": "folovllm.frontend.async_llm",
    "SamplingParams": "folovllm.common.sampling_params",
    "StructuredOutputsParams": "folovllm.common.structured_outputs",
    "Logprob": "folovllm.frontend.outputs",
    "RequestOutput": "folovllm.frontend.outputs",
    "CompletionOutput": "folovllm.frontend.outputs",
    "FoloVLLMError": _ERRORS,
    "ConfigError": _ERRORS,
    "ModelError": _ERRORS,
    "RequestError": _ERRORS,
    "RequestFailedError": _ERRORS,
    "EngineStartError": _ERRORS,
    "EngineDeadError": _ERRORS,
}


def _check_links() -> None:
    """Raises ImportError where one of the four rooms is no folder, and says why: the bare error would mislead."""
    here = os.path.dirname(os.path.abspath(__file__))
    for room in ("common", "core_proc", "worker_proc", "frontend"):
        path = os.path.join(here, room)
        if os.path.isfile(path):
            raise ImportError(
                f"{path} arrived as a text file instead of a symbolic link to ../{room}: this copy was made without "
                "links (git with core.symlinks=false, or an archive tool that drops them). Clone again with "
                "`git clone -c core.symlinks=true URL`, or install the wheel (`pip install .`), which has no links"
            )
        if not os.path.isdir(path):
            raise ImportError(
                f"{path} is missing: in a checkout it is a symbolic link to ../{room}, in a wheel a folder"
            )


_check_links()

if not TYPE_CHECKING:  # hidden from type checkers, so that they still report a name that does not exist

    def __getattr__(name: str) -> object:
        if name not in _HOME_OF:
            raise AttributeError(f"module 'folovllm' has no attribute {name!r}")
        return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME_OF])
