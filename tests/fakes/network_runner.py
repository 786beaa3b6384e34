"""Feeds tokens through a network in steps of given sizes, as a scheduler could, and collects all logits."""

import pathlib

import torch

from folovllm.common.model_config import read_model_config
from folovllm.worker_proc.attention.backend import AttentionBackend
from folovllm.worker_proc.device import Placement
from folovllm.worker_proc.kv_tensors import KVTensors
from folovllm.worker_proc.models.registry import CausalLM, build_model
from folovllm.worker_proc.weights import load_weights
from tests.fakes.attention import PagedRequest, build_metadata, positions_of, scattered_blocks


class NetworkRunner:
    """A network with its weights, over caches of its own."""

    def __init__(
        self,
        folder: pathlib.Path,
        backend: AttentionBackend,
        placement: Placement,
        max_model_len: int,
        block_size: int,
    ) -> None:
        self.config = read_model_config(folder)
        self.model: CausalLM = build_model(self.config, placement, max_model_len)
        load_weights(self.model, folder)
        self.backend = backend
        self._placement = placement
        self._block_size = block_size

    def logits(self, prompts: list[torch.Tensor], step_sizes: list[int]) -> list[torch.Tensor]:
        """Each step gives every unfinished request its next tokens, `step_sizes` in turn (the last one repeats)."""
        blocks, num_blocks = scattered_blocks([len(prompt) for prompt in prompts], self._block_size)
        kv = KVTensors(self.config, num_blocks, self._block_size, self._placement)
        requests = [PagedRequest(owned) for owned in blocks]
        outputs: list[list[torch.Tensor]] = [[] for _ in prompts]
        sizes = list(step_sizes)
        while any(request.num_computed < len(prompt) for request, prompt in zip(requests, prompts, strict=True)):
            self._step(kv, prompts, requests, outputs, sizes[0])
            sizes = sizes[1:] or sizes
        return [torch.cat(parts) for parts in outputs]

    def _step(
        self,
        kv: KVTensors,
        prompts: list[torch.Tensor],
        requests: list[PagedRequest],
        outputs: list[list[torch.Tensor]],
        size: int,
    ) -> None:
        left = {row: len(prompt) - requests[row].num_computed for row, prompt in enumerate(prompts)}
        counts = {row: min(size, rest) for row, rest in left.items() if rest}
        rows = sorted(counts, key=lambda row: counts[row] != 1)
        lengths = [counts[row] for row in rows]
        active = [requests[row] for row in rows]
        ids = torch.cat([prompts[row][requests[row].num_computed :][: counts[row]] for row in rows])
        device = self._placement.device
        step = self.backend.begin_step(kv, build_metadata(active, lengths, self._block_size, device))
        hidden = self.model.forward(ids.to(device), positions_of(active, lengths).to(device), step)
        for row, part in zip(rows, self.model.compute_logits(hidden).split(lengths), strict=True):
            outputs[row].append(part)
            requests[row].num_computed += len(part)
