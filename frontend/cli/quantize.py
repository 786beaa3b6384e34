"""`folovllm quantize`: makes a 4-bit checkpoint of a model. The work is done by a process of the worker's side."""

import pathlib
from typing import Any, Literal

import click

from folovllm.frontend.cli.options import GroupedCommand, complete_model, option

_EXAMPLES = (
    "folovllm quantize demo smollm2-4bit --group-size 64",
    "folovllm quantize Qwen/Qwen3-0.6B qwen3-4bit --calibration mytext.txt --desc-act",
)
_FORMAT, _TEXT, _HOW = "Format", "Text", "How"
_EVALUATION_SAMPLES = 32


@click.command(cls=GroupedCommand, examples=_EXAMPLES, short_help="Makes a 4-bit checkpoint of a model (GPTQ).")
@click.argument("model", shell_complete=complete_model)
@click.argument("out", type=click.Path(path_type=pathlib.Path))
@option(_FORMAT, "--bits", type=click.Choice(["4", "8"]), default="4", help="Bits of a number [4].")
@option(_FORMAT, "--group-size", type=int, default=128, help="Inputs that share a scale: 16 to 1024, -1 for all [128].")
@option(_FORMAT, "--asymmetric", is_flag=True, help="A zero of its own for each group: better, and slightly larger.")
@option(_FORMAT, "--desc-act", is_flag=True, help="Groups in activation order: better, and slightly slower.")
@option(_FORMAT, "--head", is_flag=True, help="Quantize the head too; a tied embedding then stays beside it.")
@option(_TEXT, "--calibration", default="builtin", metavar="FILE", help="Text file to calibrate on [builtin].")
@option(_TEXT, "--num-samples", type=click.IntRange(min=1), default=128, help="Pieces of it that are used [128].")
@option(_TEXT, "--sample-tokens", type=click.IntRange(min=2), default=512, help="Tokens of a piece [512].")
@option(
    _HOW,
    "--quantizer",
    type=click.Choice(["auto", "own", "gptqmodel"]),
    default="auto",
    help="Whose GPTQ [auto: the package GPTQModel where it is installed].",
)
@option(
    _HOW, "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where [CUDA where present]."
)
def quantize(model: str, out: pathlib.Path, **given: Any) -> int:
    """Quantizes MODEL with GPTQ into the new folder OUT, and shows its perplexity before and after.

    Interrupted, the same command goes on after the last finished layer; with GPTQModel, which keeps none, it starts
    again from the beginning.
    """
    from folovllm.common.child_process import run_module
    from folovllm.common.quantize_job import QuantizeJob, begin_job
    from folovllm.frontend.calibration_text import builtin_text, name_of_builtin, samples
    from folovllm.frontend.model_hub import resolve
    from folovllm.frontend.tokenizer import Tokenizer

    folder = resolve(model).absolute()
    tokenizer = Tokenizer.from_folder(folder)
    text, held_back = builtin_text()
    if given["calibration"] != "builtin":
        text = _read(given["calibration"])
    length = given["sample_tokens"]
    _check_length(length, folder)
    job = QuantizeJob(
        model=str(folder),
        out=str(out.absolute()),
        bits=int(given["bits"]),
        group_size=given["group_size"],
        sym=not given["asymmetric"],
        desc_act=given["desc_act"],
        head=given["head"],
        quantizer=_chosen(given["quantizer"]),
        device=given["device"],
        calibration=samples(tokenizer.encode(text), length, given["num_samples"]),
        evaluation=samples(tokenizer.encode(held_back), length, _EVALUATION_SAMPLES),
        evaluation_name=name_of_builtin(held_back),
    )
    return run_module("folovllm.worker_proc.quantize", [str(begin_job(job))])


def _check_length(length: int, folder: pathlib.Path) -> None:
    from folovllm.common.model_config import read_model_config

    most = read_model_config(folder).default_max_model_len
    if length > most:
        raise click.BadParameter(
            f"{length} tokens are more than the model's {most} positions: give at most {most}",
            param_hint="--sample-tokens",
        )


def _chosen(quantizer: Literal["auto", "own", "gptqmodel"]) -> Literal["own", "gptqmodel"]:
    import importlib.util

    if quantizer == "auto":
        return "gptqmodel" if importlib.util.find_spec("gptqmodel") else "own"
    return quantizer


def _read(name: str) -> str:
    try:
        return pathlib.Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise click.BadParameter(f"cannot read {name}: {error}", param_hint="--calibration") from error
