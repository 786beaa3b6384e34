"""What a request's sampling asks for beyond numbers that every row has: its fields as arrays, checked.

Ids that the logits have no column for cannot be sampled. They are left out wherever that changes nothing: of biases, of
allowed ids; a forbidden sequence with such an id never comes about. (At the door they are refused; a worker that knows
fewer ids than the core must still not write outside its tensors.)
"""

import dataclasses
import math
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from folovllm.common.errors import ProtocolError
from folovllm.common.messages.core_worker import SamplingRow
from folovllm.worker_proc.wire_fields import Ids, check, ints

_FLOAT32_BYTES: Final = 4
_NO_IDS: Final = np.zeros(0, np.int64)
_NO_VALUES: Final = np.zeros(0, np.float32)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class SamplingExtras:
    """What one request asks for; see SamplingRow.

    Attributes:
        presence_penalty, frequency_penalty, repetition_penalty: 0, 0 and 1 change nothing.
        bias_ids, bias_values: parallel; each id once.
        allowed_ids: None allows all.
        bad_words: sequences of at least one id.
        processors: (name, decoded argument), in order.
        logprobs: how many tokens are reported with each sampled one; None reports nothing, -1 all.
        prompt_logprobs: the same for prompt tokens.
    """

    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    bias_ids: Ids
    bias_values: npt.NDArray[np.float32]
    allowed_ids: Ids | None
    bad_words: list[Ids]
    processors: list[tuple[str, Any]]
    logprobs: int | None
    prompt_logprobs: int | None

    @property
    def has_penalty(self) -> bool:
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0.0, 0.0, 1.0)

    @property
    def concerns_sampling(self) -> bool:
        """Whether anything is asked for in the steps that sample."""
        return (
            self.has_penalty
            or self.allowed_ids is not None
            or self.logprobs is not None
            or bool(len(self.bias_ids) or self.bad_words or self.processors)
        )


def check_sampling(sampling: SamplingRow, name: str) -> None:
    """Raises ProtocolError unless the numbers that every row has are in their ranges."""
    temperature = sampling.temperature
    check(temperature >= 0 and math.isfinite(temperature), f"{name}: temperature={temperature} must be finite and ≥ 0")
    check(0 <= sampling.top_k < 2**31, f"{name}: top_k={sampling.top_k} must be ≥ 0")
    check(0 < sampling.top_p <= 1, f"{name}: top_p={sampling.top_p} must lie in (0, 1]")
    check(0 <= sampling.min_p <= 1, f"{name}: min_p={sampling.min_p} must lie in [0, 1]")
    check(0 <= sampling.sample_index < 2**31, f"{name}: sample_index={sampling.sample_index} must be ≥ 0")
    check(0 <= sampling.min_tokens < 2**31, f"{name}: min_tokens={sampling.min_tokens} must be ≥ 0")


def read_extras(sampling: SamplingRow, num_columns: int, name: str) -> SamplingExtras | None:
    """What is asked for, None if nothing is. `num_columns`: ids that can be sampled are below this.

    Raises:
        ProtocolError: a field does not fit.
    """
    _check_penalties(sampling, name)
    bias_ids, bias_values = _read_bias(sampling, num_columns, name)
    allowed = _valid(ints(sampling.allowed_token_ids, f"{name}: allowed_token_ids"), num_columns)
    for field, number in (("logprobs", sampling.logprobs), ("prompt_logprobs", sampling.prompt_logprobs)):
        check(number is None or -1 <= number < 2**31, f"{name}: {field}={number} must be ≥ -1")
    extras = SamplingExtras(
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        bias_ids=bias_ids,
        bias_values=bias_values,
        allowed_ids=allowed if sampling.allowed_token_ids else None,
        bad_words=_read_bad_words(sampling.bad_words, num_columns, name),
        processors=[(each, _decoded(argument, each, name)) for each, argument in sampling.logits_processors],
        logprobs=sampling.logprobs,
        prompt_logprobs=sampling.prompt_logprobs,
    )
    return extras if extras.concerns_sampling or extras.prompt_logprobs is not None else None


def _check_penalties(sampling: SamplingRow, name: str) -> None:
    for field, value in (
        ("presence_penalty", sampling.presence_penalty),
        ("frequency_penalty", sampling.frequency_penalty),
    ):
        check(math.isfinite(value), f"{name}: {field}={value} must be finite")
    repetition = sampling.repetition_penalty
    check(0 < repetition < math.inf, f"{name}: repetition_penalty={repetition} must be finite and > 0")


def _read_bias(sampling: SamplingRow, num_columns: int, name: str) -> tuple[Ids, npt.NDArray[np.float32]]:
    if not sampling.bias_token_ids and not sampling.bias_values:
        return _NO_IDS, _NO_VALUES
    ids = ints(sampling.bias_token_ids, f"{name}: bias_token_ids")
    check(
        len(sampling.bias_values) == _FLOAT32_BYTES * len(ids),
        f"{name}: bias_values has {len(sampling.bias_values)} bytes for {len(ids)} float32",
    )
    values = np.frombuffer(sampling.bias_values, "<f4").astype(np.float32)
    check(bool(np.isfinite(values).all()), f"{name}: bias_values must be finite")
    check(len(np.unique(ids)) == len(ids), f"{name}: bias_token_ids: a token occurs twice")
    kept = (ids >= 0) & (ids < num_columns)
    return ids[kept], values[kept]


def _read_bad_words(words: list[bytes], num_columns: int, name: str) -> list[Ids]:
    sequences = [ints(word, f"{name}: bad_words") for word in words]
    for sequence in sequences:
        check(len(sequence) > 0, f"{name}: bad_words: a sequence is empty")
    return [sequence for sequence in sequences if len(_valid(sequence, num_columns)) == len(sequence)]


def _valid(ids: Ids, num_columns: int) -> Ids:
    return ids[(ids >= 0) & (ids < num_columns)]


def _decoded(argument: str, processor: str, name: str) -> Any:
    try:
        return msgspec.json.decode(argument)
    except msgspec.DecodeError as error:
        raise ProtocolError(f"{name}: the argument of {processor} is no JSON: {error}") from error
