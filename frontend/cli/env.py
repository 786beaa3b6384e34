"""`folovllm env`: what a bug report needs. It reports what it cannot find out instead of failing."""

import importlib.metadata
import os
import pathlib
import platform
import sys
from collections.abc import Callable

import click

import folovllm

_PACKAGES = (
    "torch",
    "numpy",
    "pyzmq",
    "msgspec",
    "tokenizers",
    "safetensors",
    "jinja2",
    "click",
    "tqdm",
    "gguf",
    "starlette",
    "uvicorn",
    "numba",
    "triton",
    "transformers",
    "huggingface_hub",
    "gptqmodel",
)


@click.command(short_help="Prints versions and devices, for a bug report.")
def env() -> None:
    """Prints versions, processor, memory and devices, for a bug report."""
    for name, find in (
        ("folovllm", lambda: f"{folovllm.__version__} in {pathlib.Path(folovllm.__file__).resolve().parent}"),
        ("python", lambda: f"{platform.python_version()} ({sys.executable})"),
        ("system", platform.platform),
        ("processor", _processor),
        ("memory", _memory),
        ("cache folder", _cache),
        *((package, _version_of(package)) for package in _PACKAGES),
        ("devices", _devices),
    ):
        click.echo(f"{name:<16} {_safely(find)}")


def _safely(find: Callable[[], str]) -> str:
    try:
        return find()
    except Exception as error:  # noqa: BLE001 - whatever is broken here is what the report is for
        return f"unknown ({type(error).__name__}: {error})"


def _version_of(package: str) -> Callable[[], str]:
    def find() -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    return find


def _processor() -> str:
    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    return f"{_cpu_name()}, {usable} of {os.cpu_count()} threads usable"


def _cpu_name() -> str:
    path = pathlib.Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory() -> str:
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = (os.sysconf(name) * page / 2**30 for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
    return f"{total:.1f} GiB, {free:.1f} GiB free"


def _cache() -> str:
    from folovllm.common.config import cache_dir

    return str(cache_dir())


def _devices() -> str:
    import torch

    if not torch.cuda.is_available():
        return "cpu (no CUDA device)"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{', '.join(names)} (CUDA {torch.version.cuda})"
