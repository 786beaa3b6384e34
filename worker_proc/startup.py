"""From a configuration to a ModelRunner that has served: device, weights, KV cache, warm-up.

Warm-up and, on a GPU, the measurement of memory go through `ModelRunner.execute` itself, with steps such as the core
sends.
"""

import dataclasses
import pathlib
from collections.abc import Callable

import torch

from folovllm.common.errors import ConfigError
from folovllm.common.messages.lifecycle import ConfigureWorker, MemoryUse, WorkerReady
from folovllm.common.model_config import ModelConfig, read_model_config
from folovllm.worker_proc.attention.backend import AttentionBackend
from folovllm.worker_proc.attention.choice import choose_backend
from folovllm.worker_proc.cpu_steps import CpuSteps
from folovllm.worker_proc.device import (
    Placement,
    available_memory,
    choose_device,
    describe_device,
    dtype_name,
    place,
    resolve_dtype,
    set_threads,
)
from folovllm.worker_proc.fp8_cache import calibrate
from folovllm.worker_proc.kernels.cpu.background import CpuKernels
from folovllm.worker_proc.kv_size import check_fits, decide_num_blocks
from folovllm.worker_proc.kv_tensors import KVTensors, bytes_per_block
from folovllm.worker_proc.model_runner import ModelRunner
from folovllm.worker_proc.models.registry import CausalLM, build_model
from folovllm.worker_proc.phases import Phases
from folovllm.worker_proc.quantization.registry import linear_maker, type_around
from folovllm.worker_proc.rehearsal import Rehearsal, rehearsal_steps
from folovllm.worker_proc.request_states import RequestStates
from folovllm.worker_proc.sample.processors import LogitsProcessor, load_processors
from folovllm.worker_proc.step_arrays import StepLimits
from folovllm.worker_proc.step_graphs import NoGraphs, StepGraphs
from folovllm.worker_proc.weights import checkpoint_dtype, fill_dummy_weights, load_weights

_GRAPHS = 2**31  # left for captured steps: their activations, and what the driver keeps of each
_WARM_UP = Rehearsal(num_requests=2, prompt_len=16, num_decodes=2)


class Startup:
    """Builds one runner. `check_stop` is called between the parts and raises if the process is to end."""

    def __init__(self, configure: ConfigureWorker, phases: Phases, check_stop: Callable[[], None]) -> None:
        self._config = configure.config
        self._max_model_len = configure.max_model_len
        self._phases = phases
        self._check_stop = check_stop
        self._folder = pathlib.Path(configure.config.model)

    @torch.inference_mode()
    def run(self) -> tuple[ModelRunner, WorkerReady]:
        """The runner, ready to serve, and the report for the core.

        Raises:
            ConfigError: an option asks for what this machine does not have, or memory is too little.
            ModelError: the model's folder cannot be used.
        """
        config = self._config
        with self._phases.measure("choose device, read config"):
            model_config = read_model_config(self._folder)
            placement = self._place(model_config)
            kernels = CpuKernels(model_config, config.block_size, placement)
            backend = choose_backend(config.attention_backend, model_config, placement, config.block_size, kernels)
        processors: dict[str, LogitsProcessor] = {}
        if config.logits_processors:
            with self._phases.measure("load logits processors"):
                processors = load_processors(config.logits_processors)
        with self._phases.measure("load weights"):
            model, weight_bytes = self._load(model_config, placement)
        scales = None
        if placement.fp8_cache:
            with self._phases.measure("calibrate KV cache"):
                scales = self._calibrate(model_config, placement, model)
        self._check_stop()
        activations = 0
        if placement.device.type == "cuda":
            with self._phases.measure("measure peak memory"):
                activations = self._measure_activations(model_config, placement, model, backend)
            self._check_stop()
        with self._phases.measure("allocate KV cache"):
            num_blocks = self._num_blocks(model_config, placement, activations)
            kv = KVTensors(model_config, num_blocks, config.block_size, placement, scales)
            states = RequestStates(self._limits(model_config, num_blocks), placement.device)
            graphs = choose_graphs(model, backend, kv, states, kernels)
            runner = ModelRunner(model, backend, kv, states, graphs, processors)
        self._check_stop()
        with self._phases.measure("warm up"):
            rehearse(runner, states, kv, _WARM_UP)
        memory = [
            MemoryUse("weights", weight_bytes),
            MemoryUse("KV cache", kv.data.nbytes),
            MemoryUse("requests' tokens and block tables", states.num_bytes()),
        ]
        if activations:
            memory.append(MemoryUse("peak activations", activations))
        device, dtype = describe_device(placement.device), dtype_name(placement.dtype)
        return runner, WorkerReady(num_blocks, device, dtype, backend.name, self._phases.rows, memory)

    def _place(self, model_config: ModelConfig) -> Placement:
        set_threads(self._config.cpu_threads)
        torch.set_num_interop_threads(1)
        stored = model_config.dtype
        if stored is None and self._config.load_format == "auto":
            stored = checkpoint_dtype(self._folder)
        device = choose_device(self._config.device)
        placement = place(device, resolve_dtype(self._config.dtype, type_around(model_config, device, stored)))
        placement = dataclasses.replace(placement, fp8_cache=self._config.kv_cache_dtype == "fp8")
        return make_invariant(placement, model_config) if self._config.batch_invariant else placement

    def _load(self, model_config: ModelConfig, placement: Placement) -> tuple[CausalLM, int]:
        """The model with its weights, and their bytes."""
        files = None if self._config.load_format == "dummy" else self._folder
        linears = linear_maker(model_config, placement, files)
        model = build_model(model_config, placement, self._max_model_len, linears)
        weight_bytes = sum(tensor.nbytes for _, tensor in model.checkpoint_tensors())
        if self._config.load_format == "dummy":
            fill_dummy_weights(model, self._config.seed)
        else:
            load_weights(model, self._folder)
        return model, weight_bytes

    def _calibrate(self, model_config: ModelConfig, placement: Placement, model: CausalLM) -> torch.Tensor:
        most = min(self._max_model_len, self._config.max_num_batched_tokens)
        return calibrate(model, model_config, placement, most, self._num_valid_token_ids(model_config))

    def _num_valid_token_ids(self, model_config: ModelConfig) -> int:
        known = self._config.num_valid_token_ids
        return model_config.vocab_size if known is None else min(known, model_config.vocab_size)

    def _limits(self, model_config: ModelConfig, num_blocks: int) -> StepLimits:
        config = self._config
        return StepLimits(
            num_slots=config.max_num_seqs,
            max_model_len=self._max_model_len,
            max_num_batched_tokens=config.max_num_batched_tokens,
            num_blocks=num_blocks,
            block_size=config.block_size,
            vocab_size=model_config.vocab_size,
            num_valid_token_ids=self._num_valid_token_ids(model_config),
        )

    def _num_blocks(self, model_config: ModelConfig, placement: Placement, activations: int) -> int:
        config, device = self._config, placement.device
        per_block = bytes_per_block(model_config, placement.kv_dtype, config.block_size)
        available = available_memory(device)
        blocks_of_one = -(-self._max_model_len // config.block_size)
        if device.type == "cpu":
            usable = int(available * config.gpu_memory_utilization)
        else:
            total = torch.cuda.get_device_properties(device).total_memory
            usable = int(total * config.gpu_memory_utilization) - (total - available) - activations
            if placement.use_triton:
                usable -= _GRAPHS
            else:  # PagedBackend copies one layer's keys and values of a step's requests, at worst padded to twice.
                usable = int(usable / (1 + 2 / model_config.num_hidden_layers))
        num_blocks = decide_num_blocks(config, per_block, blocks_of_one, usable, is_cpu=device.type == "cpu")
        check_fits(num_blocks * per_block, available - activations)
        return num_blocks

    def _measure_activations(
        self, model_config: ModelConfig, placement: Placement, model: CausalLM, backend: AttentionBackend
    ) -> int:
        """Bytes that the largest steps take beyond weights and KV cache."""
        config, device = self._config, placement.device
        kv = KVTensors(model_config, 2, config.block_size, placement)
        states = RequestStates(self._limits(model_config, 2), device)
        runner = ModelRunner(model, backend, kv, states)
        budget = config.max_num_batched_tokens
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        rehearse(runner, states, kv, Rehearsal(1, budget, 1))
        rehearse(runner, states, kv, Rehearsal(config.max_num_seqs, budget // config.max_num_seqs, 1))
        peak = torch.cuda.max_memory_allocated(device) - before
        del runner, states, kv
        torch.cuda.empty_cache()
        return peak


def make_invariant(placement: Placement, model_config: ModelConfig) -> Placement:
    """The same for answers that do not depend on the batch.

    Raises:
        ConfigError: that is not to be had here.
    """
    if placement.device.type != "cpu" or placement.dtype == torch.float32:
        here = f"{placement.device.type} with {dtype_name(placement.dtype)}"
        raise ConfigError(f"batch_invariant needs device='cpu' with dtype bfloat16 or float16; this is {here}")
    if model_config.quantization is not None:
        raise ConfigError("batch_invariant needs weights that are not quantized")
    return dataclasses.replace(placement, batch_invariant=True)


def choose_graphs(
    model: CausalLM,
    backend: AttentionBackend,
    kv: KVTensors,
    states: RequestStates,
    kernels: CpuKernels,
) -> StepGraphs:
    """Captured steps where the attention backend can be captured, which is Triton's on CUDA; compiled ones on a CPU.

    None of them where answers must not depend on the batch: a step of few requests is computed as one of many.

    Raises:
        ConfigError: there are no attention kernels, which that needs.
    """
    if kernels.batch_invariant:
        if backend.name != "paged":
            raise ConfigError(f"batch_invariant needs attention_backend='paged' (or 'auto'), not {backend.name!r}")
        kernels.require()
        return NoGraphs()
    if states.device.type == "cpu" and backend.name == "paged":
        return CpuSteps(kernels.begin_network(model.parts(), kv))
    if states.device.type != "cuda" or backend.name != "triton_paged":
        return NoGraphs()
    from folovllm.worker_proc.attention.triton_paged import TritonPagedBackend
    from folovllm.worker_proc.cuda_graphs import CudaGraphs

    assert isinstance(backend, TritonPagedBackend)
    return CudaGraphs(model, backend, kv, states)


@torch.inference_mode()
def rehearse(runner: ModelRunner, states: RequestStates, kv: KVTensors, rehearsal: Rehearsal) -> None:
    """Executes the steps of `rehearsal` as the loop does, then leaves rows and cache as if nothing had been."""
    for step in rehearsal_steps(states.limits, rehearsal):
        runner.execute(step).wait()
    states.forget_all()
    kv.data[:, :, :, 1].zero_()
