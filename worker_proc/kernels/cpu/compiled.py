"""Machine code for this processor, made by LLVM (llvmlite) from what `llvm.Kernel` describes, or kept from before."""

import functools
import hashlib
import pathlib
import time
from collections.abc import Callable
from typing import Any

import llvmlite
import llvmlite.binding as llvm

from folovllm.common.log import get_logger
from folovllm.worker_proc.kernels.cpu.code_cache import CodeCache
from folovllm.worker_proc.kernels.cpu.llvm import ENTRY, Kernel

logger = get_logger(__name__)


class Compiled:
    """Machine code and what keeps it in memory; `address` is that of its function."""

    def __init__(self, kernel: Kernel) -> None:
        kernel.builder.ret_void()
        self._load(_machine_code(str(kernel.module), _target()))

    @classmethod
    def by(cls, cache: CodeCache | None, build: Callable[..., Kernel], *arguments: Any) -> "Compiled":
        """What `build(*arguments)` describes, from the cache if it is there; if not, it is compiled and put there.

        Code is found by the function's name, its arguments as they are written, and a hash of these modules' sources:
        to describe all kernels of a network takes Python 0.5 s, which each start would wait for.
        """
        what = f"{build.__module__}.{build.__qualname__}{arguments}"
        made_for = (what, _sources(), *_machine(), llvmlite.__version__, str(llvm.llvm_version_info))
        code = None if cache is None else cache.find(made_for)
        if code is None:
            name = build.__qualname__.removeprefix("build_")
            logger.info("compiling %s, once; torch's operators serve meanwhile", name)
            began = time.perf_counter()
            kernel = build(*arguments)
            kernel.builder.ret_void()
            code = _machine_code(str(kernel.module), _target())
            logger.info("compiled %s in %.1f s", name, time.perf_counter() - began)
            if cache is not None:
                cache.keep(made_for, code)
        compiled = cls.__new__(cls)
        compiled._load(code)
        return compiled

    def _load(self, code: bytes) -> None:
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _target())
        self._engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        self._engine.finalize_object()
        self.address: int = self._engine.get_function_address(ENTRY)


def _machine() -> tuple[str, str]:
    """The processor's name and features."""
    return llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()


def _target() -> Any:
    cpu, features = _machine()
    return llvm.Target.from_default_triple().create_target_machine(cpu=cpu, features=features, opt=3)


@functools.cache
def _sources() -> str:
    """A hash of everything that descriptions of kernels are made by: this folder, and the layouts of weights."""
    folder = pathlib.Path(__file__).parent
    layers = folder.parents[1] / "layers"
    files = [*sorted(folder.glob("*.py")), layers / "blocked.py", layers / "int4_layout.py"]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _machine_code(text: str, machine: Any) -> bytes:
    """An object file."""
    module = llvm.parse_assembly(text)
    module.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    options.loop_unrolling = False  # what pays is unrolled by hand
    passes = llvm.create_pass_builder(machine, options)
    passes.getModulePassManager().run(module, passes)
    return bytes(machine.emit_object(module))


def prepare() -> None:
    """Once in a process, before the first `Compiled`."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
