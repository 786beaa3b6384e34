"""What `folovllm quantize` asks of the process that does it, as a file in the folder that is being written.

The frontend has the tokenizer and the worker's side has torch; the job carries token ids from one to the other. It
stays until the work is done, beside the layers finished so far: the same call takes it up again (this project's
quantizer where it was interrupted, GPTQModel, which keeps nothing, from the beginning), another one is refused.
"""

import math
import pathlib
from typing import Literal

import msgspec

from folovllm.common.errors import ConfigError

Quantizer = Literal["own", "gptqmodel"]

_FOLDER = ".quantize"
_JOB = "job.json"
_BITS = (4, 8)
_GROUP_SIZES = range(16, 1025)
_WHOLE_INPUT = -1
_WORD_BITS = 32


class QuantizeJob(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model to be quantized.

    Attributes:
        model: its folder.
        out: the folder to be written.
        bits, group_size, sym, desc_act, damping: see the worker's `quantization.quantizer`. Bits are 4 or 8, group
            sizes 16 to 1,024 in whole words or -1, damping is above 0: it is doubled until H can be inverted.
        head: whether lm_head is quantized, too; an embedding it was tied to stays as it is.
        quantizer: this project's own, or the package GPTQModel.
        device: "auto", "cpu" or "cuda".
        calibration: token ids of samples of one length, whose activations decide how numbers are rounded.
        evaluation: token ids of samples of one length, on which the perplexity is measured before and after.
        evaluation_name: what text that is, for the report.

    Raises:
        ConfigError: a field has a value that no quantizer can work with.
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

    def __post_init__(self) -> None:
        if self.bits not in _BITS:
            raise ConfigError(f"{self.bits} bits are not supported; supported are 4 and 8")
        if self.group_size != _WHOLE_INPUT and self.group_size not in _GROUP_SIZES:
            raise ConfigError(
                f"group size {self.group_size} is not supported; supported are 16 to 1024, and -1 for all inputs"
            )
        if self.group_size != _WHOLE_INPUT and self.group_size % (_WORD_BITS // self.bits):
            raise ConfigError(f"group size {self.group_size} is no multiple of {_WORD_BITS // self.bits}")
        if not 0 < self.damping < math.inf:
            raise ConfigError(f"damping is {self.damping:g}: it must be a number above 0")
        _check_samples("calibration", self.calibration)
        _check_samples("evaluation", self.evaluation)


def _check_samples(name: str, samples: list[list[int]]) -> None:
    lengths = sorted({len(sample) for sample in samples})
    if len(lengths) != 1:
        raise ConfigError(f"{name} needs samples of one length, but it has lengths {lengths}")
    if lengths[0] < 2:  # a perplexity is of tokens that have one before them
        raise ConfigError(f"{name} has samples of {lengths[0]} tokens: at least 2 are needed")
    if min(map(min, samples)) < 0:
        raise ConfigError(f"{name} holds a token id below 0")


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
