"""Decoding one request to a few on a CPU against the memory's read rate, and where a step's time goes.

    python -m bench.cpu_decode --model demo

Three things in turns, round after round: reads of 1 GiB by a compiled kernel in all threads (the limit: a step reads
every weight once); the bare step (`kernels.cpu.network`, its logits and the largest of them) with its parts alone, and
the same by torch's operators; and `LLM.generate` of 128 tokens after a prompt of 128, in processes of its own, less the
same with one token. Lower quartiles are shown for the bare step, medians for the engine. What `rest` counts is norms,
rotation, writes to the cache, SiLU and barriers.
"""

import functools
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from bench.common import machine, print_table, write_json
from bench.worker_step import random_step
from bench.workload import exactly, parser, random_prompts
from folovllm import LLM
from folovllm.common.model_config import read_model_config
from folovllm.frontend.model_hub import resolve
from folovllm.worker_proc.attention.paged import PagedBackend
from folovllm.worker_proc.device import Placement, resolve_dtype, set_threads
from folovllm.worker_proc.kernels.cpu.background import CpuKernels
from folovllm.worker_proc.kernels.cpu.compiled import Compiled
from folovllm.worker_proc.kernels.cpu.llvm import F32, Kernel
from folovllm.worker_proc.kernels.cpu.network import HeadProduct
from folovllm.worker_proc.kernels.cpu.team import Team, find_team
from folovllm.worker_proc.kv_tensors import KVTensors
from folovllm.worker_proc.layers.linear import Linear
from folovllm.worker_proc.models.registry import build_model
from folovllm.worker_proc.weights import load_weights

BLOCK_SIZE = 16
CONTEXT = 255
PROMPT_LEN = OUTPUT_LEN = 128
_READ_BYTES = 2**30
_LANES = 64
_TURNS = 6  # of each thing in a round


class Reader:
    """Reads memory as fast as the machine can: 256 bytes at a time, lines asked for 4 KiB ahead."""

    def __init__(self, team: Team, num_bytes: int) -> None:
        self._memory = torch.ones(num_bytes // 4)
        self._team, self._code = team, Compiled(_reader())
        self._sums = torch.zeros(team.num_threads, 64)
        parts = len(self._memory) // _LANES
        self._arguments = np.array(
            [self._memory.data_ptr(), parts, self._sums.data_ptr(), team.thread_num_address, team.num_threads], np.int64
        )

    def read(self) -> None:
        self._team.run(self._code.address, self._arguments.ctypes.data)
        assert float(self._sums[:, 0].sum()) > 0


def _reader() -> Kernel:
    k = Kernel("read")
    memory, parts, sums, thread_num, num_threads = (k.argument(index) for index in range(5))
    thread = k.call_int(thread_num)
    total = k.variable(k.constant(0.0, _LANES))
    with k.loop(*k.share(parts, thread, num_threads)) as part:
        place = k.sum(memory, k.product(part, k.integer(_LANES * 4)))
        for line in range(_LANES * 4 // 64):
            k.prefetch(k.sum(place, k.integer(4096 + 64 * line)))
        k.set(total, k.plus(k.get(total), k.load(place, k.integer(0), F32, _LANES)))
    k.store(k.get(total), k.sum(sums, k.product(thread, k.integer(256))), k.integer(0), F32, _LANES)
    return k


class BareStep:
    """A network in this process with everything that a step needs."""

    def __init__(self, folder: pathlib.Path, dtype: str, team: Team) -> None:
        self._config = config = read_model_config(folder)
        self._placement = Placement(torch.device("cpu"), resolve_dtype(dtype, config.dtype))
        self._model = build_model(config, self._placement, 1024)
        self._kernels = CpuKernels(config, BLOCK_SIZE, self._placement)
        load_weights(self._model, folder)
        parts = self._model.parts()
        linears = [linear for layer in parts.layers for linear in (layer.qkv, layer.out, layer.gate_up, layer.down)]
        weights = [linear.blocked for linear in linears if isinstance(linear, Linear) and linear.blocked]
        assert len(weights) == len(linears), "the weights are not packed on this processor: torch computes all steps"
        self._products = [HeadProduct(weight, None, team, self._kernels.cache) for weight in weights]
        head = parts.embedding.nbytes
        self.weight_bytes = sum(weight.out_features * weight.padded_in * 2 for weight in weights) + head

    def parts(self, rows: int) -> dict[str, Callable[[], Any]]:
        """What a step of so many requests takes: as a whole, part by part, and by torch's operators."""
        config, kernels, model = self._config, self._kernels, self._model
        metadata, positions = random_step(rows, CONTEXT, 1)
        kv = KVTensors(config, int(metadata.block_table.max()) + 1, BLOCK_SIZE, self._placement)
        network, kernel = kernels.begin_network(model.parts(), kv).wait(), kernels.attention.wait()
        assert network is not None and kernel is not None, "there is no kernel for this network"
        ids = torch.randint(0, config.vocab_size, (rows,))
        hidden = torch.zeros(rows, config.hidden_size, dtype=self._placement.dtype)
        sizes = {product.in_features for product in self._products}
        inputs = {size: torch.zeros(rows, size, dtype=self._placement.dtype) for size in sizes}
        query = torch.zeros(rows, config.num_attention_heads, config.head_dim, dtype=self._placement.dtype)
        plan = kernel.plan(metadata.block_table, metadata.seq_lens, kv.layer(0))
        backend = PagedBackend(config.num_attention_heads, kernels.attention)

        def step() -> None:
            hidden = network.forward(ids, positions, metadata)
            assert hidden is not None, "there is no code for so many rows"
            logits = network.logits(hidden)
            assert logits is not None, "there is no code for so many rows"
            logits.argmax(dim=1)

        def products() -> None:
            for product in self._products:
                product(inputs[product.in_features])

        def attention() -> None:
            for layer in range(config.num_hidden_layers):
                plan.attend(query, kv.layer(layer))

        def torchs() -> None:
            model.compute_logits(model.forward(ids, positions, backend.begin_step(kv, metadata))).argmax(dim=1)

        logits = functools.partial(network.logits, hidden)
        return {"step": step, "products": products, "attention": attention, "logits": logits, "torch": torchs}


def seconds_of(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def engine_ms(llm: LLM, prompts: list[list[int]]) -> float:
    """Milliseconds of one step of all prompts: what `OUTPUT_LEN` more tokens take."""
    short = seconds_of(lambda: llm.generate(prompts, exactly(1), use_tqdm=False))
    long = seconds_of(lambda: llm.generate(prompts, exactly(1 + OUTPUT_LEN), use_tqdm=False))
    return (long - short) / OUTPUT_LEN * 1e3


def rows_of_table(
    times: dict[tuple[int, str], list[float]], engine: dict[int, list[float]], limit_ms: float
) -> list[dict[str, float]]:
    """A line for each number of requests: milliseconds, and shares of the limit in percent."""
    table = []
    for rows, of_engine in engine.items():
        ms = {what: sorted(of)[len(of) // 4] * 1e3 for (count, what), of in times.items() if count == rows}
        rest = ms["step"] - ms["products"] - ms["attention"] - ms["logits"]
        engine_step = statistics.median(of_engine)
        table.append(
            {
                "requests": rows,
                "engine_tokens_per_s": round(rows / engine_step * 1e3, 1),
                "engine_ms": round(engine_step, 2),
                "engine_percent_of_limit": round(limit_ms / engine_step * 100, 1),
                "step_ms": round(ms["step"], 2),
                "step_percent_of_limit": round(limit_ms / ms["step"] * 100, 1),
                "products_ms": round(ms["products"], 2),
                "attention_ms": round(ms["attention"], 2),
                "logits_ms": round(ms["logits"], 2),
                "rest_ms": round(rest, 2),
                "torch_ms": round(ms["torch"], 2),
            }
        )
    return table


def measure(options: Any) -> dict[str, Any]:
    counts, rounds, num_bytes = [1, 2, 4], options.repeats, _READ_BYTES
    if options.quick:
        counts, rounds, num_bytes = [1], 1, 2**26
    set_threads(None)
    team = find_team()
    assert team is not None, "this torch does not use GNU's OpenMP"
    times: dict[tuple[int, str], list[float]] = {}
    reads: list[float] = []
    engine: dict[int, list[float]] = {count: [] for count in counts}
    prompts = random_prompts([PROMPT_LEN] * max(counts), options.seed)
    engine_options = {"dtype": options.dtype, "device": "cpu", "enable_prefix_caching": False}
    with LLM(options.model, **engine_options) as llm, torch.inference_mode():
        bare = BareStep(resolve(options.model), options.dtype, team)
        parts = {(count, what): run for count in counts for what, run in bare.parts(count).items()}
        reader = Reader(team, num_bytes)
        for _ in range(rounds):
            reads += [seconds_of(reader.read) for _ in range(_TURNS)]
            for part, run in parts.items():
                run()
                times.setdefault(part, []).extend(seconds_of(run) for _ in range(_TURNS))
            for count in counts:
                engine[count].append(engine_ms(llm, prompts[:count]))
    gb_per_s = num_bytes / sorted(reads)[len(reads) // 4] / 1e9
    limit_ms = bare.weight_bytes / gb_per_s / 1e6
    return {
        "threads": team.num_threads,
        "weight_bytes": bare.weight_bytes,
        "read_gb_per_s": round(gb_per_s, 1),
        "limit_ms": round(limit_ms, 2),
        "rows": rows_of_table(times, engine, limit_ms),
    }


def main() -> None:
    options = parser("Decoding a few requests on a CPU against the memory's read rate.")
    options.set_defaults(repeats=5)
    arguments = options.parse_args()
    result = measure(arguments)
    print(f"{machine()['processor']}, {result['threads']} threads")
    print(
        f"reads {result['read_gb_per_s']} GB/s; weights {result['weight_bytes'] / 1e6:.0f} MB: {result['limit_ms']} ms"
    )
    print_table(list(result["rows"][0]), [list(row.values()) for row in result["rows"]])
    write_json("cpu_decode-quick" if arguments.quick else "cpu_decode", {"result": result})


if __name__ == "__main__":
    main()
