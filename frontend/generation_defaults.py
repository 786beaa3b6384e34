"""What a model folder says about generating: sampling defaults and the ids that end an answer."""

import pathlib
from typing import Any

import msgspec

from folovllm.common.errors import ModelError, RequestError
from folovllm.common.log import get_logger
from folovllm.common.model_config import end_of_sequence_ids, read_generation_defaults, read_model_config
from folovllm.common.sampling_params import SamplingParams
from folovllm.frontend.tokenizer import Tokenizer

logger = get_logger(__name__)

_NEUTRAL = {"temperature": 1.0, "top_k": -1, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}


class ModelDefaults(msgspec.Struct, frozen=True, kw_only=True):
    """Values used where a request gives none.

    Attributes:
        temperature, top_k, top_p, min_p, repetition_penalty: generation_config.json's, else the neutral value.
        from_file: names of those that the file sets.
        eos_token_ids: ids that end an answer unless `ignore_eos` is set.
    """

    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    from_file: tuple[str, ...] = ()
    eos_token_ids: tuple[int, ...] = ()

    def sampling_params(self) -> SamplingParams:
        """What a request without sampling parameters gets."""
        return SamplingParams(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
        )


def read_model_defaults(folder: pathlib.Path, tokenizer: Tokenizer | None) -> ModelDefaults:
    """Reads generation_config.json (and config.json) and logs which sampling defaults come from there.

    The end-of-sequence ids are generation_config.json's, else config.json's, else the tokenizer's one.

    Raises:
        ModelError: a file cannot be used.
    """
    file = read_generation_defaults(folder)
    values: dict[str, Any] = dict(file.sampling_defaults())
    if "top_k" in values:
        values["top_k"] = int(values["top_k"]) or -1  # transformers writes 0 for "all"
    if values:
        shown = ", ".join(f"{name}={value}" for name, value in values.items())
        logger.info("sampling defaults from generation_config.json: %s (explicit values win)", shown)
    eos = end_of_sequence_ids(read_model_config(folder), file)
    if not eos and tokenizer is not None and tokenizer.eos_token_id is not None:
        eos = (tokenizer.eos_token_id,)
    defaults = ModelDefaults(**{**_NEUTRAL, **values}, from_file=tuple(values), eos_token_ids=eos)
    try:
        defaults.sampling_params()
    except RequestError as error:
        raise ModelError(f"{folder / 'generation_config.json'}: {error}") from error
    return defaults
