"""Engine options: frozen, checked when they are made, with defaults; and the only reader of the environment.

Only a process's `main` unpacks an `EngineConfig`; everything below it takes numbers and collaborators.
"""

import os
import pathlib
from typing import Literal, get_args

import msgspec

from folovllm.common.errors import ConfigError
from folovllm.common.log import check_level

DType = Literal["auto", "bfloat16", "float16", "float32"]
Device = Literal["auto", "cpu", "cuda"]
SchedulingPolicy = Literal["fcfs", "priority"]
LoadFormat = Literal["auto", "dummy"]
KVCacheDType = Literal["auto", "fp8"]
AttentionBackendName = Literal["auto", "torch_naive", "paged", "triton_paged", "flash_attn"]

MAX_SLOTS = 65536
MAX_PIPELINE_DEPTH = 2

_HUGE_PAGES = "glibc.malloc.hugetlb=1"  # glibc ≥ 2.35; others ignore it
_OMP_SPIN_COUNT = "3000"  # about 60 µs: longer than the waits within a step, shorter than a time slice


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All options of one engine. Sent by whoever starts the core, passed on by the core to its workers.

    Attributes:
        model: folder of the model, already resolved (`folovllm.frontend.model_hub.resolve`).
        dtype: type of weights, activations and, by default, KV cache; "auto" takes the checkpoint's.
        device: where the worker runs; "auto" is CUDA where present, else the CPU.
        load_format: "auto" reads safetensors; "dummy" makes random weights from config.json alone.
        seed: seed of dummy weights, and of the seeds that the frontend draws for requests without one.
        num_valid_token_ids: ids the tokenizer knows (largest + 1); logits beyond are never sampled. None: all columns.
        max_model_len: longest prompt + output in tokens; None takes config.json's maximum.
        block_size: tokens in one KV block.
        num_gpu_blocks_override: number of KV blocks, instead of deriving it from memory (on the CPU too).
        gpu_memory_utilization: share of the device's memory the engine may use in all; on the CPU the share of the
            available memory that the KV pool may take at most.
        kv_cache_memory_gb: size of the KV pool in GiB, instead of deriving it; None derives it.
        kv_cache_dtype: "auto" stores K and V in the model's type; "fp8" in float8_e4m3fn with scales for each layer and
            head, in half the bytes of 16-bit types, at some cost in exactness. Needs a GPU of compute capability 8.9 or
            newer and the attention backend "triton_paged"; elsewhere the slow reference, "torch_naive".
        max_num_seqs: requests running at once (slots).
        max_num_batched_tokens: token budget of one step.
        long_prefill_token_threshold: most tokens of one prompt in one step, so that shorter prompts pass a long one;
            None sets no bound but the step's.
        max_num_partial_prefills: prompts that may be partly computed at once; None sets no bound.
        target_itl_ms: milliseconds between two tokens of a running request that prompts must not exceed: chunks are
            sized by how long steps take; None leaves the step's token budget as the only bound.
        enable_prefix_caching: take over K and V of a prompt's beginning where another request has computed it.
        scheduling_policy: "fcfs", or "priority" (lower numbers first).
        pipeline_depth: steps in flight, 1 or 2.
        max_num_queued_reqs: bound on waiting requests; more are refused.
        max_num_queued_tokens: bound on the prompt tokens of waiting requests; None sets no bound.
        max_worker_restarts: how many workers that end in a row are replaced before the engine ends with the next. One
            that has served for ten minutes begins a new row. 0: the engine ends with its worker.
        attention_backend: "auto" chooses and logs why: on CUDA "triton_paged", without Triton "flash_attn" (the package
            flash-attn, with a block_size that it can read), else "paged".
        batch_invariant: an answer's numbers do not depend on what else is computed beside it: products always take the
            same number of rows at once and add up in the same order. On a CPU, with 16-bit types, at some cost. What is
            computed another way (chunks after a preemption, blocks that another request's decoding left in the prefix
            cache) may still be rounded otherwise.
        logits_processors: functions "module:function" that requests may name, loaded by the worker at start.
        cpu_threads: threads of the CPU worker; None takes the physical cores this process may use.
        trace_file: where the scheduler's decisions are recorded, for `folovllm trace`; None records nothing.
        log_interval_s: seconds between two log lines about the engine's state while it works; 0 logs none.
        log_level: debug, info, warning or error.
    """

    model: str
    dtype: DType = "auto"
    device: Device = "auto"
    load_format: LoadFormat = "auto"
    seed: int = 0
    num_valid_token_ids: int | None = None
    max_model_len: int | None = None
    block_size: int = 16
    num_gpu_blocks_override: int | None = None
    gpu_memory_utilization: float = 0.9
    kv_cache_memory_gb: float | None = None
    kv_cache_dtype: KVCacheDType = "auto"
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    long_prefill_token_threshold: int | None = None
    max_num_partial_prefills: int | None = None
    target_itl_ms: float | None = None
    enable_prefix_caching: bool = True
    scheduling_policy: SchedulingPolicy = "fcfs"
    pipeline_depth: int = 2
    max_num_queued_reqs: int = 100_000
    max_num_queued_tokens: int | None = None
    max_worker_restarts: int = 10
    attention_backend: AttentionBackendName = "auto"
    batch_invariant: bool = False
    logits_processors: tuple[str, ...] = ()
    cpu_threads: int | None = None
    trace_file: str | None = None
    log_interval_s: float = 10.0
    log_level: str = "info"

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, get_args(DType))
        check_choice("device", self.device, get_args(Device))
        check_choice("load_format", self.load_format, get_args(LoadFormat))
        check_choice("scheduling_policy", self.scheduling_policy, get_args(SchedulingPolicy))
        check_choice("kv_cache_dtype", self.kv_cache_dtype, get_args(KVCacheDType))
        check_choice("attention_backend", self.attention_backend, get_args(AttentionBackendName))
        check_range("seed", self.seed, -(2**63), 2**63 - 1)
        check_range("block_size", self.block_size, 1, 1024)
        check_range("max_num_seqs", self.max_num_seqs, 1, MAX_SLOTS)
        check_range("max_num_batched_tokens", self.max_num_batched_tokens, 1, 2**24)
        check_range("pipeline_depth", self.pipeline_depth, 1, MAX_PIPELINE_DEPTH)
        check_range("max_num_queued_reqs", self.max_num_queued_reqs, 1, 2**31 - 1)
        check_range("max_worker_restarts", self.max_worker_restarts, 0, 2**31 - 1)
        check_optional_range("max_model_len", self.max_model_len, 2, 2**24)
        check_optional_range("num_valid_token_ids", self.num_valid_token_ids, 1, 2**31 - 1)
        check_optional_range("num_gpu_blocks_override", self.num_gpu_blocks_override, 2, 2**31 - 1)
        check_optional_range("max_num_queued_tokens", self.max_num_queued_tokens, 1, 2**53)
        check_optional_range("cpu_threads", self.cpu_threads, 1, 4096)
        check_optional_range("kv_cache_memory_gb", self.kv_cache_memory_gb, 0.0, 2.0**20)
        check_optional_range("long_prefill_token_threshold", self.long_prefill_token_threshold, 1, 2**24)
        check_optional_range("max_num_partial_prefills", self.max_num_partial_prefills, 1, MAX_SLOTS)
        check_optional_range("target_itl_ms", self.target_itl_ms, 0.1, 3_600_000.0)
        check_flag("enable_prefix_caching", self.enable_prefix_caching)
        check_flag("batch_invariant", self.batch_invariant)
        check_range("log_interval_s", self.log_interval_s, 0.0, 86_400.0)
        check_range("gpu_memory_utilization", self.gpu_memory_utilization, 0.01, 1.0)
        check_level(self.log_level)
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is smaller than max_num_seqs="
                f"{self.max_num_seqs}: a step could not give every running request its one token; raise the first "
                "or lower the second"
            )
        if self.num_gpu_blocks_override is not None and self.kv_cache_memory_gb is not None:
            raise ConfigError("num_gpu_blocks_override and kv_cache_memory_gb both set the KV pool's size; give one")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raises ConfigError unless `value` is one of `choices`."""
    if value not in choices:
        raise ConfigError(f"{name}={value!r} is not known; choose one of {', '.join(choices)}")


def check_flag(name: str, value: object) -> None:
    """Raises ConfigError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r} must be True or False")


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raises ConfigError unless `value` is a number in [low, high] (a whole one where `low` is an int)."""
    kinds = (int,) if isinstance(low, int) else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise ConfigError(f"{name}={value!r} must be {'a whole number' if kinds == (int,) else 'a number'}")
    if not low <= value <= high:
        raise ConfigError(f"{name}={value!r} is out of range; it must lie between {low} and {high}")


def check_optional_range(name: str, value: float | None, low: float, high: float) -> None:
    """`check_range` where None is allowed."""
    if value is not None:
        check_range(name, value, low, high)


def cache_dir() -> pathlib.Path:
    """Where converted models and engine keys are kept: $FOLOVLLM_CACHE, else ~/.cache/folovllm."""
    set_by_user = os.environ.get("FOLOVLLM_CACHE")
    return pathlib.Path(set_by_user).expanduser() if set_by_user else pathlib.Path.home() / ".cache" / "folovllm"


def api_keys_from_environment() -> tuple[str, ...]:
    """Keys that the HTTP server asks for: $FOLOVLLM_API_KEYS, separated by commas."""
    return tuple(key.strip() for key in os.environ.get("FOLOVLLM_API_KEYS", "").split(",") if key.strip())


def share_metrics(folder: str) -> None:
    """Tells prometheus_client that several processes count together, through files in `folder`.

    It reads this when it is imported.
    """
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder


def use_cpu_kernels() -> bool:
    """Whether the worker on a CPU may compile kernels of its own: not with $FOLOVLLM_CPU_KERNELS=torch.

    Raises:
        ConfigError: the variable is set to something else.
    """
    value = os.environ.get("FOLOVLLM_CPU_KERNELS", "auto")
    check_choice("FOLOVLLM_CPU_KERNELS", value, ("auto", "torch"))
    return value == "auto"


def default_log_level() -> str:
    """Level used where none is given: $FOLOVLLM_LOG_LEVEL, else "warning" for libraries' sake."""
    return os.environ.get("FOLOVLLM_LOG_LEVEL", "warning")


def child_environment(package_parent: str) -> dict[str, str]:
    """This process's environment, with the folder that holds the package first on PYTHONPATH.

    A child must find the very package that started it, whatever the working directory is. Two settings are for speed
    (figures in `docs/performance.md`); where the user has set one, it is kept:

    * GOMP_SPINCOUNT: threads of a parallel region that wait for each other spin for a moment only, then sleep. With
      libgomp's default of some milliseconds a step of 23 ms takes 1.9 s as soon as another process wants a core.
    * GLIBC_TUNABLES: memory comes in huge pages where the system allows them. A step reads all weights; with small
      pages it waits for address translation.
    """
    environment = {"GOMP_SPINCOUNT": _OMP_SPIN_COUNT, "GLIBC_TUNABLES": _HUGE_PAGES} | dict(os.environ)
    environment["OMP_DYNAMIC"] = "false"  # compiled kernels need every thread that they ask for
    rest = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = os.pathsep.join([package_parent, rest] if rest else [package_parent])
    return environment
