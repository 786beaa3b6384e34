"""What importing each part loads, seen in a process of its own: contracts on source do not see library imports."""

import json
import os
import subprocess
import sys

import pytest

from tests.sources import ROOT

_TIMEOUT_S = 100
_HTTP = {"http.server", "starlette", "uvicorn", "fastapi", "aiohttp", "requests", "httpx"}
_TEXT = {"transformers", "tokenizers", "jinja2", "huggingface_hub"}


def _run(code: str) -> str:
    """Output of `code` in a fresh interpreter that sees this checkout and is not measured (that would load modules)."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _loaded_by(statements: str) -> set[str]:
    code = (
        f"import sys, json\nbefore = set(sys.modules)\n{statements}\nprint(json.dumps(list(set(sys.modules) - before)))"
    )
    return set(json.loads(_run(code).splitlines()[-1]))


def _all_modules_of(room: str) -> str:
    return (
        f"import importlib, pkgutil, folovllm.{room} as room\n"
        f"for module in pkgutil.walk_packages(room.__path__, 'folovllm.{room}.'):\n"
        "    if not module.name.endswith('__main__'):\n"
        "        importlib.import_module(module.name)"
    )


def test_the_face_loads_only_the_standard_library() -> None:
    loaded = _loaded_by("import folovllm")
    assert "folovllm" in loaded
    assert not {name for name in loaded if name.split(".")[0] not in {*sys.stdlib_module_names, "folovllm"}}
    assert not {name for name in loaded if name.startswith("folovllm.")}


def test_the_face_is_imported_within_50_ms() -> None:
    code = (
        "import sys, time\n"
        "times = []\n"
        "for _ in range(3):\n"
        "    sys.modules.pop('folovllm', None)\n"
        "    start = time.process_time()\n"
        "    import folovllm\n"
        "    times.append(time.process_time() - start)\n"
        "print(min(times))"
    )
    assert float(_run(code)) <= 0.050


def test_sampling_params_cost_neither_torch_nor_a_tokenizer() -> None:
    loaded = _loaded_by("from folovllm import SamplingParams")
    assert "folovllm.common.sampling_params" in loaded
    assert not loaded & {"torch", "numpy", "zmq", *_TEXT}


def test_the_core_loads_no_tensors_no_text_no_http() -> None:
    loaded = _loaded_by(_all_modules_of("core_proc"))
    assert "folovllm.core_proc.engine_core" in loaded
    assert not loaded & ({"torch", "safetensors"} | _TEXT | _HTTP)
    assert not {name for name in loaded if name.startswith(("folovllm.frontend", "folovllm.worker_proc"))}


@pytest.mark.timeout(120)
def test_the_worker_loads_no_text_no_http() -> None:
    loaded = _loaded_by("import folovllm.worker_proc.worker, folovllm.worker_proc.model_runner")
    assert "torch" in loaded
    assert not loaded & (_TEXT | _HTTP)
    assert not {name for name in loaded if name.startswith(("folovllm.frontend", "folovllm.core_proc"))}


def test_the_frontend_loads_no_torch() -> None:
    loaded = _loaded_by("from folovllm import LLM, AsyncLLM")
    assert "folovllm.frontend.llm" in loaded
    assert not loaded & {"torch", "transformers", *_HTTP}
