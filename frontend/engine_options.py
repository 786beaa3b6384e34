"""The keyword arguments that `LLM`, `AsyncLLM` and the command line share, and how they become an EngineConfig."""

import difflib
import pathlib
from collections.abc import Sequence
from typing import Any, TypedDict, cast

from folovllm.common.config import (
    AttentionBackendName,
    Device,
    DType,
    EngineConfig,
    KVCacheDType,
    LoadFormat,
    SchedulingPolicy,
    default_log_level,
)
from folovllm.common.errors import ConfigError


class EngineOptions(TypedDict, total=False):
    """Options of an engine that one starts oneself; meaning and defaults stand at `EngineConfig`.

    `log_level` is also the level of the frontend's own log lines, which go to stderr once it is given; without it the
    engine's processes log at $FOLOVLLM_LOG_LEVEL, else "warning", and the logging of the calling program is left alone.
    """

    dtype: DType
    device: Device
    load_format: LoadFormat
    seed: int
    max_model_len: int | None
    block_size: int
    num_gpu_blocks_override: int | None
    gpu_memory_utilization: float
    kv_cache_memory_gb: float | None
    kv_cache_dtype: KVCacheDType
    max_num_seqs: int
    max_num_batched_tokens: int
    long_prefill_token_threshold: int | None
    max_num_partial_prefills: int | None
    target_itl_ms: float | None
    enable_prefix_caching: bool
    scheduling_policy: SchedulingPolicy
    pipeline_depth: int
    max_num_queued_reqs: int
    max_num_queued_tokens: int | None
    max_worker_restarts: int
    attention_backend: AttentionBackendName
    batch_invariant: bool
    logits_processors: Sequence[str]
    cpu_threads: int | None
    trace_file: str | None
    log_interval_s: float
    log_level: str | None


def check_names(options: EngineOptions, who: str) -> None:
    """Raises TypeError, as Python does, for a keyword that is no option."""
    known = EngineOptions.__annotations__
    unknown = sorted(set(options) - set(known))
    if unknown:
        close = difflib.get_close_matches(unknown[0], ["model", *known], n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        message = f"{who}() got an unexpected keyword argument {unknown[0]!r}{hint}; options are {', '.join(known)}"
        raise TypeError(message)


def make_config(model: pathlib.Path, options: EngineOptions) -> EngineConfig:
    """The checked configuration. Raises ConfigError, naming the option."""
    given = dict(cast("dict[str, Any]", options))
    if given.get("log_level") is None:
        given["log_level"] = default_log_level()
    processors = given.get("logits_processors", ())
    if isinstance(processors, str) or not all(isinstance(name, str) for name in processors):
        raise ConfigError(f"logits_processors={processors!r} must be a list of 'module:function'")
    given["logits_processors"] = tuple(processors)
    return EngineConfig(model=str(model), **given)
