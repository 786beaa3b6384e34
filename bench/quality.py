"""What quantization costs in quality: perplexity, agreement of greedy choices, and KL of the next-token distribution.

    python -m bench.quality demo ./smollm2-4bit

The text is the held-back part of Python's own documentation (`folovllm.frontend.calibration_text`), which no quantizer
of this project has calibrated on. Rounding to nearest on the same grid is shown beside: what GPTQ is for.
"""

import argparse
import math
import pathlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F

from bench.common import print_table, quality_rows, write_json
from folovllm.common.model_config import read_model_config
from folovllm.frontend.calibration_text import builtin_text, name_of_builtin, samples
from folovllm.frontend.model_hub import resolve
from folovllm.frontend.tokenizer import Tokenizer
from folovllm.worker_proc.device import Placement, set_threads
from folovllm.worker_proc.models.registry import CausalLM, build_model
from folovllm.worker_proc.quantization.calibration import CalibrationLinears, round_over, run_over
from folovllm.worker_proc.quantization.config import Scheme, read_gptq_config
from folovllm.worker_proc.quantization.quantizer import Curvature, round_to_nearest
from folovllm.worker_proc.quantization.storage import Quantized
from folovllm.worker_proc.quantize import load_model
from folovllm.worker_proc.weights import load_weights

SAMPLE_TOKENS = 512
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Quality:
    """Of one model, against the unquantized one.

    Attributes:
        perplexity: exp of the mean of -log p(token).
        greedy_agreement: share of positions at which both would choose the same token.
        kl: mean of KL(unquantized ‖ this one) over positions, in nats.
    """

    perplexity: float
    greedy_agreement: float
    kl: float


class _Sums:
    def __init__(self) -> None:
        self.loss = self.agreed = self.kl = 0.0
        self.count = 0

    def add(self, logits: torch.Tensor, exact: torch.Tensor, following: torch.Tensor) -> None:
        """Logits [T, vocab] of this model and of the unquantized one, and the tokens [T] that follow."""
        log_p, log_exact = F.log_softmax(logits.float(), 1), F.log_softmax(exact.float(), 1)
        self.loss += float(F.nll_loss(log_p, following, reduction="sum"))
        self.agreed += float((log_p.argmax(1) == log_exact.argmax(1)).sum())
        self.kl += float(F.kl_div(log_p, log_exact, reduction="sum", log_target=True))
        self.count += len(following)

    def result(self) -> Quality:
        return Quality(math.exp(self.loss / self.count), self.agreed / self.count, self.kl / self.count)


def compare(models: Mapping[str, CausalLM], sequences: torch.Tensor) -> dict[str, Quality]:
    """Every model against the first, over token ids [sequences, length]."""
    sums = {name: _Sums() for name in models}
    for sequence in sequences:
        exact: torch.Tensor | None = None
        for name, model in models.items():
            logits = model.compute_logits(run_over(model, sequence[None])[:-1])
            exact = logits if exact is None else exact
            sums[name].add(logits, exact, sequence[1:])
    return {name: each.result() for name, each in sums.items()}


def rounded_to_nearest(folder: pathlib.Path, scheme: Scheme) -> CausalLM:
    """The model in `folder` with every linear weight but the head's rounded for itself."""
    placement = Placement(CPU, torch.bfloat16)
    linears = CalibrationLinears(placement)
    config = read_model_config(folder)
    model = build_model(config, placement, config.default_max_model_len, linears)
    load_weights(model, folder)

    def rounding(
        prefix: str, _parts: Mapping[str, int], weight: torch.Tensor, _curvature: Callable[[], Curvature]
    ) -> Quantized | None:
        return round_to_nearest(weight, scheme) if prefix else None

    round_over(model, linears, torch.zeros(1, 2, dtype=torch.int64), rounding)
    return model


def measure(folder: pathlib.Path, quantized: pathlib.Path, num_samples: int) -> dict[str, Any]:
    """Qualities by name, and the text they were measured on."""
    _, text = builtin_text()
    sequences = torch.tensor(samples(Tokenizer.from_folder(folder).encode(text), SAMPLE_TOKENS, num_samples))
    config = read_model_config(quantized).quantization
    if config is None:
        raise ValueError(f"{quantized} is not quantized")
    scheme = read_gptq_config(config.fields).scheme
    with torch.inference_mode():
        models = {
            "unquantized": load_model(folder, CPU),
            "quantized": load_model(quantized, CPU),
            "rounded to nearest": rounded_to_nearest(folder, scheme),
        }
        found = compare(models, sequences)
    return {
        "text": name_of_builtin(text),
        "tokens": sequences.numel(),
        "scheme": asdict(scheme),
        "quality": {name: asdict(quality) for name, quality in found.items()},
    }


def show(result: Mapping[str, Any]) -> None:
    """The table."""
    quality: Mapping[str, Mapping[str, float]] = result["quality"]
    print(f"{result['tokens']} tokens of {result['text']}; {result['scheme']}")
    print_table(["model", "perplexity", "ratio", "same greedy token", "KL, nats"], quality_rows(quality))


def main() -> None:
    parser = argparse.ArgumentParser(description="What quantization costs in quality.")
    parser.add_argument("model", help="the unquantized model: folder, hub id or 'demo'")
    parser.add_argument("quantized", type=pathlib.Path, help="folder that `folovllm quantize` wrote")
    parser.add_argument("--samples", type=int, default=32, help="pieces of 512 tokens")
    options = parser.parse_args()
    set_threads(None)
    result = measure(resolve(options.model), options.quantized, options.samples)
    show(result)
    write_json("quality", {"result": result})


if __name__ == "__main__":
    main()
