"""What an FP8 KV cache costs in exactness: logits, perplexity, agreement of greedy choices, KL of the next token.

    python -m bench.kv_quality --model demo

Every token of every piece of text is computed twice, as one prompt over a cache of the model's own type and over one of
FP8, by the same attention backend. The text is the one that `bench.quality` uses. `bench.gpu` measures the same for the
model of its speeds, on the card.
"""

import dataclasses
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from bench.common import print_table, write_json
from bench.workload import parser
from folovllm.common.model_config import ModelConfig, read_model_config
from folovllm.frontend.calibration_text import builtin_text, name_of_builtin, samples
from folovllm.frontend.model_hub import resolve
from folovllm.frontend.tokenizer import Tokenizer
from folovllm.worker_proc.attention.backend import AttentionBackend, AttentionMetadata
from folovllm.worker_proc.attention.choice import choose_backend
from folovllm.worker_proc.attention.torch_naive import TorchNaiveBackend
from folovllm.worker_proc.device import Placement, choose_device, place, resolve_dtype, set_threads
from folovllm.worker_proc.fp8_cache import calibrate
from folovllm.worker_proc.kernels.cpu.background import CpuKernels
from folovllm.worker_proc.kv_tensors import KVTensors
from folovllm.worker_proc.models.registry import CausalLM, build_model
from folovllm.worker_proc.weights import fill_dummy_weights, load_weights

SAMPLE_TOKENS = 512
_BLOCK_SIZE = 16


class Effect:
    """Sums over tokens, of logits over an FP8 cache against those over the model's own."""

    def __init__(self) -> None:
        self._count = 0
        self._error = self._norm = self._agreed = self._kl = 0.0
        self._losses = [0.0, 0.0]

    def add(self, exact: torch.Tensor, found: torch.Tensor, following: torch.Tensor) -> None:
        """Logits [T, vocab] of both, and the tokens [T] that follow."""
        exact, found = exact.float(), found.float()
        log_exact, log_found = exact.log_softmax(1), found.log_softmax(1)
        self._count += len(following)
        self._error += float((found - exact).square().sum())
        self._norm += float(exact.square().sum())
        self._agreed += float((exact.argmax(1) == found.argmax(1)).sum())
        self._kl += float(F.kl_div(log_found, log_exact, reduction="sum", log_target=True))
        for index, log_p in enumerate((log_exact, log_found)):
            self._losses[index] += float(F.nll_loss(log_p, following, reduction="sum"))

    def figures(self) -> dict[str, float]:
        """Error relative to the logits' norm, share of equal greedy tokens, KL in nats, both perplexities."""
        exact, found = (math.exp(loss / self._count) for loss in self._losses)
        return {
            "relative error of logits": math.sqrt(self._error / self._norm),
            "same greedy token": self._agreed / self._count,
            "KL, nats": self._kl / self._count,
            "perplexity": exact,
            "perplexity, FP8": found,
        }


def load(folder: pathlib.Path, placement: Placement, *, dummy: bool) -> tuple[CausalLM, ModelConfig]:
    """The model; `dummy`: with random weights, as `load_format="dummy"` has."""
    config = read_model_config(folder)
    model = build_model(config, placement, config.default_max_model_len)
    if dummy:
        fill_dummy_weights(model, 0)
    else:
        load_weights(model, folder)
    return model, config


@torch.inference_mode()
def effect_on_logits(
    model: CausalLM, config: ModelConfig, placement: Placement, sequences: torch.Tensor
) -> dict[str, float]:
    """`sequences`: token ids [sequences, length]."""
    effect = Effect()
    scales = calibrate(model, config, placement, config.default_max_model_len, config.vocab_size)
    placements = [placement, dataclasses.replace(placement, fp8_cache=True)]
    backend = _backend(config, placement)
    for sequence in sequences.to(placement.device):
        logits: list[torch.Tensor] = []
        for each in placements:
            num_blocks = 1 + -(-len(sequence) // _BLOCK_SIZE)
            kv = KVTensors(config, num_blocks, _BLOCK_SIZE, each, scales if each.fp8_cache else None)
            step = backend.begin_step(kv, _whole_prompt(len(sequence), placement.device))
            hidden = model.forward(sequence, torch.arange(len(sequence), device=placement.device), step)
            logits.append(model.compute_logits(hidden[:-1]))
        effect.add(logits[0], logits[1], sequence[1:])
    return effect.figures()


def _backend(config: ModelConfig, placement: Placement) -> AttentionBackend:
    """Triton's, or the reference: those that read both caches."""
    if not placement.use_triton:
        return TorchNaiveBackend()
    return choose_backend("triton_paged", config, placement, _BLOCK_SIZE, CpuKernels(config, _BLOCK_SIZE, placement))


def _whole_prompt(length: int, device: torch.device) -> AttentionMetadata:
    blocks = torch.arange(1, 1 + -(-length // _BLOCK_SIZE), device=device)
    return AttentionMetadata(
        query_lens=[length],
        seq_lens=[length],
        num_decodes=int(length == 1),
        block_table=blocks[None],
        slot_mapping=torch.arange(length, device=device) + _BLOCK_SIZE,
        seq_lens_device=torch.tensor([length], device=device),
    )


def shown(figures: dict[str, float]) -> Iterator[list[str]]:
    """Rows of a table."""
    for name, value in figures.items():
        yield [name, f"{value:.2%}" if value < 1 and "KL" not in name else f"{value:.4f}"]


def main() -> None:
    options = parser("What an FP8 KV cache costs in exactness.")
    options.add_argument("--samples", type=int, default=16, help=f"pieces of {SAMPLE_TOKENS} tokens")
    given = options.parse_args()
    set_threads(None)
    folder = resolve(given.model)
    _, text = builtin_text()
    num_samples = 1 if given.quick else given.samples
    sequences = torch.tensor(samples(Tokenizer.from_folder(folder).encode(text), SAMPLE_TOKENS, num_samples))
    placement = place(choose_device(given.device), resolve_dtype(given.dtype, None))
    model, config = load(folder, placement, dummy=False)
    figures = effect_on_logits(model, config, placement, sequences)
    print(f"{sequences.numel()} tokens of {name_of_builtin(text)}, {given.dtype} against FP8")
    print_table(["figure", "value"], list(shown(figures)))
    result: dict[str, Any] = {"tokens": sequences.numel(), "text": name_of_builtin(text), "figures": figures}
    write_json("kv_quality" + ("-quick" if given.quick else ""), {"options": vars(given), "result": result})


if __name__ == "__main__":
    main()
