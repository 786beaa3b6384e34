"""Which device, which number type, how many threads, and how much memory there is for the KV pool."""

import dataclasses
import importlib.util
import os
import pathlib

import torch

from folovllm.common.errors import ConfigError
from folovllm.common.log import get_logger

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_DEPENDENT_LAUNCH = (9, 0)  # compute capability from which a kernel may begin before its predecessor is through
_PROC = pathlib.Path("/proc")
_CGROUP = pathlib.Path("/sys/fs/cgroup")
_UNLIMITED = 2**60  # cgroup v1 writes "no limit" as a number near 2**63

logger = get_logger(__name__)


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a model's tensors live, of which type they are, and what its layers run as.

    Attributes:
        device, dtype: of weights and activations, and of the KV cache unless `fp8_cache`.
        use_triton: layers run as Triton kernels.
        dependent_launch: these may begin before the kernel before them is through (`kernels.triton.pdl`).
        batch_invariant: a row's products must not depend on how many rows there are.
        fp8_cache: the KV cache is float8_e4m3fn with scales, see `fp8_cache`.
    """

    device: torch.device
    dtype: torch.dtype
    use_triton: bool = False
    dependent_launch: bool = False
    batch_invariant: bool = False
    fp8_cache: bool = False

    @property
    def kv_dtype(self) -> torch.dtype:
        """Type of the KV cache's numbers."""
        return torch.float8_e4m3fn if self.fp8_cache else self.dtype


def choose_device(requested: str) -> torch.device:
    """ "auto", "cpu" or "cuda" → the device; "auto" is CUDA where present.

    Raises:
        ConfigError: "cuda" is asked for and there is none.
    """
    if requested == "cpu" or (requested == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        built = "finds no usable GPU" if torch.version.cuda else "is built without CUDA"
        raise ConfigError(f"device='cuda' was asked for, but torch {torch.__version__} {built}")
    return torch.device("cuda", torch.cuda.current_device())


def place(device: torch.device, dtype: torch.dtype) -> Placement:
    """What the layers run as on this device: Triton kernels on CUDA where the package is there."""
    use_triton = device.type == "cuda" and importlib.util.find_spec("triton") is not None
    if device.type == "cuda" and not use_triton:
        logger.warning("the package triton is missing: torch's operators compute instead, several times slower")
    hopper = use_triton and torch.cuda.get_device_capability(device) >= _DEPENDENT_LAUNCH
    return Placement(device, dtype, use_triton, hopper)


def resolve_dtype(requested: str, checkpoint_dtype: str | None) -> torch.dtype:
    """The type of weights and KV cache; "auto" takes the checkpoint's (float32 where that is not known)."""
    name = requested if requested != "auto" else checkpoint_dtype or "float32"
    if name not in _DTYPES:
        raise ConfigError(f"dtype={name!r} is not known; choose one of auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """ "bfloat16", "float16" or "float32"."""
    return str(dtype).removeprefix("torch.")


def describe_device(device: torch.device) -> str:
    """The device in words, for logs: "cpu (2 threads)" or "cuda:0 (NVIDIA H100)"."""
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"cpu ({threads} thread{'s' if threads != 1 else ''})"
    return f"{device} ({torch.cuda.get_device_name(device)})"


def available_memory(device: torch.device) -> int:
    """Bytes that can still be taken: free GPU memory, or on the CPU what the machine and the cgroup leave."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return min(meminfo_available(_PROC / "meminfo"), cgroup_memory_left(_CGROUP, _own_cgroup()))


def meminfo_available(path: pathlib.Path) -> int:
    """MemAvailable of a /proc/meminfo, in bytes."""
    for line in path.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{path} has no MemAvailable line")


def cgroup_memory_left(root: pathlib.Path, group: str) -> int:
    """Bytes below the strictest memory limit of the cgroup (version 1 or 2) and its ancestors.

    Page cache counts as used by a cgroup, but is given up under pressure, so inactive file pages are not counted.
    """
    left = _UNLIMITED
    for folder in _with_ancestors(root, group):
        limit, usage = _read_limit(folder / "memory.max"), folder / "memory.current"
        if limit < _UNLIMITED and usage.is_file():
            left = min(left, limit - int(usage.read_text()) + _inactive_file(folder / "memory.stat", "inactive_file"))
    for folder in _with_ancestors(root / "memory", group):
        limit, usage = _read_limit(folder / "memory.limit_in_bytes"), folder / "memory.usage_in_bytes"
        if limit < _UNLIMITED and usage.is_file():
            cache = _inactive_file(folder / "memory.stat", "total_inactive_file")
            left = min(left, limit - int(usage.read_text()) + cache)
    return max(left, 0)


def usable_threads() -> int:
    """Threads worth starting: physical cores this process may run on, within the cgroup's CPU quota; at least 1.

    Two hyperthreads of a core share the vector units that the products are bound by.
    """
    allowed = os.sched_getaffinity(0)
    cores = {physical_core(cpu, pathlib.Path("/sys/devices/system/cpu")) for cpu in allowed}
    quota = cgroup_cpu_quota(_CGROUP, _own_cgroup())
    return max(1, round(min(len(cores), quota)))


def physical_core(cpu: int, root: pathlib.Path) -> str:
    """A name that the hyperthreads of one core share; the CPU's own number where the kernel does not say."""
    path = root / f"cpu{cpu}" / "topology" / "thread_siblings_list"
    return path.read_text().strip() if path.is_file() else str(cpu)


def cgroup_cpu_quota(root: pathlib.Path, group: str) -> float:
    """CPUs that the strictest quota of the cgroup (version 1 or 2) and its ancestors allows; infinite without one."""
    quotas = [float("inf")]
    for folder in _with_ancestors(root, group):
        path = folder / "cpu.max"
        if path.is_file():
            quota, period = path.read_text().split()
            quotas += [] if quota == "max" else [int(quota) / int(period)]
    for folder in _with_ancestors(root / "cpu", group):
        quota_path, period_path = folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us"
        if quota_path.is_file() and period_path.is_file() and (microseconds := int(quota_path.read_text())) > 0:
            quotas.append(microseconds / int(period_path.read_text()))
    return min(quotas)


def set_threads(requested: int | None) -> int:
    """Sets the threads of torch's operators, `usable_threads()` where None is requested; returns their number."""
    threads = usable_threads() if requested is None else requested
    torch.set_num_threads(threads)
    return threads


def _own_cgroup() -> str:
    """Path of this process's cgroup below the mount; in version 1 that of the memory controller."""
    path = _PROC / "self" / "cgroup"
    if not path.is_file():
        return "/"
    groups = [line.split(":", 2) for line in path.read_text().splitlines()]
    for _, controllers, group in groups:
        if controllers == "" or "memory" in controllers.split(","):
            return group
    return "/"


def _with_ancestors(root: pathlib.Path, group: str) -> list[pathlib.Path]:
    """Folders from the mount down to the group; inside a container the group's own folder may not be visible."""
    folders = [root]
    for part in pathlib.PurePosixPath(group).parts:
        if part not in ("/", ".."):
            folders.append(folders[-1] / part)
    return folders


def _read_limit(path: pathlib.Path) -> int:
    if not path.is_file():
        return _UNLIMITED
    text = path.read_text().strip()
    return _UNLIMITED if text == "max" else int(text)


def _inactive_file(path: pathlib.Path, name: str) -> int:
    if not path.is_file():
        return 0
    for line in path.read_text().splitlines():
        if line.split()[0] == name:
            return int(line.split()[1])
    return 0
