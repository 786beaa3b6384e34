"""Captures graphs into one memory that all of them share, as long as there is room for it."""

from collections.abc import Callable
from typing import TypeVar

import torch

from folovllm.common.log import get_logger

_T = TypeVar("_T")

logger = get_logger(__name__)


class GraphMemory:
    """Graphs run one after another, so one pool serves them all. A graph for which memory does not suffice is the last
    that is tried: each would take memory from the steps, which run without it as well."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._is_full = False

    def capture(self, compute: Callable[[], _T]) -> tuple[torch.cuda.CUDAGraph, _T] | None:
        """Runs `compute` once, which compiles kernels and lets cuBLAS choose, then records it.

        Returns:
            The graph and what `compute` gave while it was recorded; None if there is no room.
        """
        if self._is_full:
            return None
        try:
            return self._capture(compute)
        except torch.OutOfMemoryError as error:
            cause = str(error)
        self._is_full = True
        logger.warning("no memory left for a captured step (%s): no more are captured, new shapes run eagerly", cause)
        torch.cuda.empty_cache()
        return None

    def _capture(self, compute: Callable[[], _T]) -> tuple[torch.cuda.CUDAGraph, _T]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            compute()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Not `torch.cuda.graph`, which waits for the device, collects garbage and empties the allocator's cache first.
        # The output thread may wait for its events meanwhile, which only a capture of this thread alone allows.
        with torch.cuda.stream(stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                result = compute()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        return graph, result
