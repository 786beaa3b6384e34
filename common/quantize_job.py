"""What `folovllm quantize` asks of the process that does it, as a file in the folder that is being written.

The frontend has the tokenizer and the worker's side has torch; the job carries token ids from one to the other. It
stays until the work is done, beside the layers finished so far: the same call goes on where it was interrupted, another
one is refused.
"""

import pathlib
from typing import Literal

import msgspec

from folovllm.common.errors import ConfigError

Quantizer = Literal["own", "gptqmodel"]

_FOLDER = ".quantize"
_JOB = "job.json"


class QuantizeJob(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model to be quantized.

    Attributes:
        model: its folder.
        out: the folder to be written.
        bits, group_size, sym, desc_act, damping: see the worker's `quantization.quantizer`.
        head: whether lm_head is quantized, too; an embedding it was tied to stays as it is.
        quantizer: this project's own, or the package GPTQModel.
        device: "auto", "cpu" or "cuda".
        calibration: token ids of samples of one length, whose activations decide how numbers are rounded.
        evaluation: token ids of samples of one length, on which the perplexity is measured before and after.
        evaluation_name: what text that is, for the report.
    """

    model: str
    out: str
    bits: int = 4
    group_size: int = 128
    sym: bool = True
    desc_act: bool = False
    damping: float = 0.05
    head: bool = False
    quantizer: Quantizer = "own"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    calibration: list[list[int]]
    evaluation: list[list[int]]
    evaluation_name: str


def work_folder(out: pathlib.Path) -> pathlib.Path:
    """Where the job and what is finished of it lie until all is done."""
    return out / _FOLDER


def begin_job(job: QuantizeJob) -> pathlib.Path:
    """Writes the job into its output folder and returns its file; an equal one that is there already is taken up again.

    Raises:
        ConfigError: the folder holds something else, or another job.
    """
    out = pathlib.Path(job.out)
    path, data = work_folder(out) / _JOB, msgspec.json.encode(job)
    if path.is_file():
        if path.read_bytes() != data:
            raise ConfigError(f"{out} holds an unfinished job with other options or another text; remove the folder")
        return path
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty: give a new folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def read_job(path: pathlib.Path) -> QuantizeJob:
    """Raises ConfigError where the file cannot be understood."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=QuantizeJob)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
