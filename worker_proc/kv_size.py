"""How many KV blocks the worker takes. Pure: numbers in, a number or a clear refusal out."""

from folovllm.common.config import EngineConfig
from folovllm.common.errors import ConfigError

_GIB = 2**30
_MAX_DEFAULT_CPU_BYTES = 4 * _GIB  # the machine's memory belongs to others too
_FEWEST_BLOCKS = 2  # the null block and one more


def decide_num_blocks(config: EngineConfig, per_block: int, blocks_of_one: int, usable: int, *, is_cpu: bool) -> int:
    """Number of KV blocks, the null block included.

    Args:
        config: `num_gpu_blocks_override` and `kv_cache_memory_gb` decide where they are set.
        per_block: bytes of one block.
        blocks_of_one: blocks of one request of the greatest length.
        usable: bytes that may be taken where neither option is set.
        is_cpu: take no more than 4 GiB, and no more than all slots can fill.

    Raises:
        ConfigError: the memory is too little for the null block and one more.
    """
    if config.num_gpu_blocks_override is not None:
        return config.num_gpu_blocks_override
    if config.kv_cache_memory_gb is not None:
        source, num_blocks = "kv_cache_memory_gb", int(config.kv_cache_memory_gb * _GIB) // per_block
    else:
        source, num_blocks = "gpu_memory_utilization", usable // per_block
        if is_cpu:
            most = min(_MAX_DEFAULT_CPU_BYTES // per_block, config.max_num_seqs * blocks_of_one + 1)
            num_blocks = min(num_blocks, most)
    if num_blocks < _FEWEST_BLOCKS:
        raise ConfigError(
            f"{source} leaves room for {max(num_blocks, 0)} KV blocks, but at least {_FEWEST_BLOCKS} are needed, of "
            f"{config.block_size} tokens or {_mib(per_block)} each; raise it, or lower "
            "block_size, max_num_batched_tokens or max_num_seqs"
        )
    return num_blocks


def check_fits(kv_bytes: int, available: int) -> None:
    """Raises ConfigError if the pool is larger than the memory that can be taken."""
    if kv_bytes > available:
        raise ConfigError(
            f"the KV cache would take {_mib(kv_bytes)}, but only {_mib(available)} can be taken; lower "
            "num_gpu_blocks_override or kv_cache_memory_gb"
        )


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"
