"""Quantizes a model: `python -m folovllm.worker_proc.quantize JOB` (see `common.quantize_job`; `folovllm quantize`).

Perplexity before, the quantization itself, the new checkpoint, and perplexity after: measured on the files that were
written, read as an engine would read them. Each layer is kept on disk when it is done, and a second run of the same job
takes it from there; GPTQModel keeps none, and begins again.

Exit codes: 0 done, 1 failed, 2 wrong input, 130 SIGINT.
"""

import argparse
import pathlib
import shutil
import signal
import sys
from collections.abc import Callable, Mapping

import safetensors.torch
import torch
from tqdm import tqdm

from folovllm.common.errors import ConfigError, FoloVLLMError, ModelError
from folovllm.common.model_config import read_model_config
from folovllm.common.quantize_job import QuantizeJob, read_job, work_folder
from folovllm.worker_proc.device import Placement, choose_device, place, resolve_dtype, set_threads
from folovllm.worker_proc.models.registry import CausalLM, build_model
from folovllm.worker_proc.quantization.calibration import CalibrationLinears, curvature_of, perplexity, round_over
from folovllm.worker_proc.quantization.checkpoint import packed_tensors, split_outputs, write_checkpoint
from folovllm.worker_proc.quantization.config import Scheme
from folovllm.worker_proc.quantization.quantizer import Curvature, Recipe, quantize
from folovllm.worker_proc.quantization.registry import linear_maker, type_around
from folovllm.worker_proc.quantization.storage import Quantized
from folovllm.worker_proc.weights import checkpoint_dtype, checkpoint_files, load_weights

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head"


def main(arguments: list[str] | None = None) -> int:
    """The program; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m folovllm.worker_proc.quantize")
    parser.add_argument("job", type=pathlib.Path, help="file with a QuantizeJob")
    try:
        job = read_job(parser.parse_args(arguments).job)
        set_threads(None)
        try:
            with torch.inference_mode():
                sys.stdout.write(run(job))
        except KeyboardInterrupt:
            goes_on = "begins again" if job.quantizer == "gptqmodel" else "goes on from here"
            sys.stderr.write(f"Interrupted: the same command {goes_on}\n")
            return 128 + signal.SIGINT
    except FoloVLLMError as error:
        sys.stderr.write(f"Error: {error}\n")
        return 2 if isinstance(error, ConfigError | ModelError) else 1
    return 0


def run(job: QuantizeJob) -> str:
    """Does the job; returns the report. Call it under `torch.inference_mode()`."""
    source, target = pathlib.Path(job.model), pathlib.Path(job.out)
    if read_model_config(source).quantization is not None:
        raise ModelError(f"{source} is quantized already")
    device = choose_device(job.device)
    evaluation = torch.tensor(job.evaluation, device=device)
    if job.quantizer == "gptqmodel":
        from folovllm.worker_proc.quantization.with_gptqmodel import quantize_with_gptqmodel

        before = perplexity(load_model(source, device), evaluation)
        with torch.inference_mode(False):  # it has its own idea of gradients
            quantize_with_gptqmodel(job, device)
    else:
        recipe = Recipe(Scheme(job.bits, job.group_size, job.sym), job.desc_act, job.damping)
        work = _Work(source, device, work_folder(target), recipe)
        before = perplexity(work.model, evaluation)
        work.round_layers(torch.tensor(job.calibration, device=device), head=job.head)
        write_checkpoint(source, target, work.packed, recipe)
    after = perplexity(load_model(target, device), evaluation)
    shutil.rmtree(work_folder(target))
    return _report(job, before, after)


class _Work:
    """A model that is being quantized.

    Attributes:
        model: the network, in the type it is stored in.
        packed: full names of the modules done → their tensors.
    """

    def __init__(self, source: pathlib.Path, device: torch.device, finished: pathlib.Path, recipe: Recipe) -> None:
        config = read_model_config(source)
        placement = Placement(device, resolve_dtype("auto", config.dtype or checkpoint_dtype(source)))
        self._tied = config.tie_word_embeddings
        self._finished, self._recipe = finished, recipe
        self._linears = CalibrationLinears(placement)
        self.model = build_model(config, placement, config.default_max_model_len, self._linears)
        load_weights(self.model, source)
        self.packed: dict[str, dict[str, torch.Tensor]] = {}

    def round_layers(self, sequences: torch.Tensor, *, head: bool) -> None:
        """Runs the model over token ids [sequences, length], and every layer's rounding with it."""
        total = self._linears.num_layers - (0 if self._tied else 1) + head
        with tqdm(total=total, desc="Quantizing", unit="layer", dynamic_ncols=True, disable=None) as bar:

            def rounding(
                prefix: str, parts: Mapping[str, int], weight: torch.Tensor, curvature: Callable[[], Curvature]
            ) -> Quantized | None:
                if prefix == "":  # the head
                    return None
                rounded = self._round(prefix, parts, weight, curvature)
                bar.update(1)
                return rounded

            exact, rough = round_over(self.model, self._linears, sequences, rounding)
            if head:
                weight = dict(self.model.checkpoint_tensors())[_EMBEDDING if self._tied else f"{_HEAD}.weight"]
                self._round("", {_HEAD: weight.shape[0]}, weight, lambda: curvature_of(exact, rough))
                bar.update(1)

    def _round(
        self, prefix: str, parts: Mapping[str, int], weight: torch.Tensor, curvature: Callable[[], Curvature]
    ) -> Quantized:
        for name, size in (*parts.items(), ("its input", weight.shape[1])):
            if size % (32 // self._recipe.scheme.bits):
                raise ModelError(f"{prefix}{name} has size {size}, which cannot be packed into 32-bit words")
        path = self._finished / f"{prefix}{'+'.join(parts)}.safetensors"
        if path.is_file():
            tensors = safetensors.torch.load_file(path, device=str(weight.device))
            rounded = Quantized(tensors["numbers"], tensors["zeros"], tensors["scales"], tensors["groups"])
        else:
            rounded = quantize(weight, curvature(), self._recipe)
            _keep(path, rounded)
        for name, part in split_outputs(rounded, parts).items():
            self.packed[f"{prefix}{name}"] = packed_tensors(part, self._recipe.scheme)
        return rounded


def _keep(path: pathlib.Path, rounded: Quantized) -> None:
    """Written aside and renamed: a file that is there is whole."""
    tensors = {
        "numbers": rounded.numbers,
        "zeros": rounded.zeros,
        "scales": rounded.scales,
        "groups": rounded.groups,
    }
    aside = path.with_suffix(".partial")
    safetensors.torch.save_file(tensors, aside)
    aside.rename(path)


def load_model(folder: pathlib.Path, device: torch.device) -> CausalLM:
    """The model in a folder, as an engine would load it."""
    config = read_model_config(folder)
    stored = type_around(config, device, config.dtype or checkpoint_dtype(folder))
    placement = place(device, resolve_dtype("auto", stored))
    linears = linear_maker(config, placement, folder)
    model = build_model(config, placement, config.default_max_model_len, linears)
    load_weights(model, folder)
    return model


def _report(job: QuantizeJob, before: float, after: float) -> str:
    sizes = [sum(file.stat().st_size for file in checkpoint_files(pathlib.Path(each))) for each in (job.model, job.out)]
    tokens = sum(len(sequence) - 1 for sequence in job.evaluation)
    return (
        f"{job.out}: {job.bits} bits, group size {job.group_size}\n"
        f"  weights     {sizes[0] / 1e6:9.1f} MB before {sizes[1] / 1e6:9.1f} MB after ({sizes[1] / sizes[0]:.2f} ×)\n"
        f"  perplexity  {before:9.3f}    before {after:9.3f}    after ({after / before:.3f} ×)\n"
        f"  measured on {tokens} tokens of {job.evaluation_name}\n"
    )


if __name__ == "__main__":
    sys.exit(main())
