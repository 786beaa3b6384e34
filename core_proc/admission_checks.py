"""Is every number of a request in its range? Whoever runs into one that is not raises `Refused`, which names the field.

What passes here can be put into the worker's arrays as it is: lengths are those of whole entries, ids lie below the one
bound on ids, floats are finite also as float32. And it can be reported: log probabilities fit into a frame.
"""

import math
from collections.abc import Collection, Iterator
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from folovllm.common.messages.core_worker import SamplingRow
from folovllm.common.messages.frontend_core import EngineCoreRequest
from folovllm.common.sampling_params import (
    MAX_BIASED_TOKENS,
    MAX_LOGITS_PROCESSORS,
    MAX_PROCESSOR_ARGUMENT_CHARACTERS,
    MAX_STOP_TOKEN_IDS,
    MAX_TIMEOUT_S,
    MAX_TOKENS,
    MAX_TOP_K,
)
from folovllm.common.transport import MAX_FRAME_BYTES

MAX_BAD_WORDS: Final = 4096  # sequences: a word has one for each spelling
MAX_BAD_WORD_TOKENS: Final = 65_536  # of all sequences together
MAX_CACHE_SALT_CHARACTERS: Final = 256
_ENTRY_BYTES: Final = 4  # int32 and float32 alike
_LOGPROB_BYTES: Final = 2 * _ENTRY_BYTES  # a token id and a value
_MAX_LOGPROB_BYTES: Final = MAX_FRAME_BYTES // 2  # a longer frame ends the connection, and others' rows come with ours
_FLOAT32_MAX: Final = float(np.finfo(np.float32).max)
_FLOAT32_SMALLEST: Final = float(np.finfo(np.float32).tiny)

TokenIds = npt.NDArray[np.int32]


class Refused(Exception):
    """The request can never run; `field` is the one of EngineCoreRequest or SamplingRow at fault."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class RequestChecks:
    """Checks of what stands in a request, whatever the engine is doing.

    Args:
        num_valid_token_ids: token ids are below it.
        max_num_seqs: rows of a step that may all carry log probabilities.
        logits_processors: names that the worker has loaded.
    """

    def __init__(self, *, num_valid_token_ids: int, max_num_seqs: int, logits_processors: Collection[str]) -> None:
        self._num_valid_token_ids = num_valid_token_ids
        self._max_num_seqs = max_num_seqs
        self._logits_processors = logits_processors

    def check(self, message: EngineCoreRequest) -> None:
        """Raises Refused at the first field that is wrong; the prompt's length is the caller's matter."""
        sampling = message.sampling
        self.check_ids("prompt_token_ids", as_token_ids("prompt_token_ids", message.prompt_token_ids))
        for name, value, low, high in _ranges(sampling):
            check_range(name, value, low, high)
        if sampling.top_p == 0:
            raise Refused("top_p", "top_p=0 must be greater than 0 and at most 1")
        self._check_stop_token_ids(sampling.stop_token_ids)
        self.check_ids("allowed_token_ids", as_token_ids("allowed_token_ids", sampling.allowed_token_ids))
        self._check_bias(sampling)
        self._check_bad_words(sampling.bad_words)
        self._check_logprobs(message)
        self._check_logits_processors(sampling.logits_processors)
        _check_timeout(message.timeout_s)
        _check_cache_salt(message.cache_salt)

    def check_ids(self, field: str, ids: TokenIds) -> None:
        """Raises Refused, with the position, unless every id is one the tokenizer knows."""
        if not ids.size:
            return
        for wrong in (int(ids.min()), int(ids.max())):
            if not 0 <= wrong < self._num_valid_token_ids:
                position = int(np.argmax(ids == wrong))
                last = self._num_valid_token_ids - 1
                raise Refused(field, f"token id {wrong} at position {position} must lie between 0 and {last}")

    def _check_stop_token_ids(self, token_ids: bytes) -> None:
        stop_set = as_token_ids("stop_token_ids", token_ids)
        if stop_set.size > MAX_STOP_TOKEN_IDS:
            raise Refused("stop_token_ids", f"{stop_set.size} ids; at most {MAX_STOP_TOKEN_IDS} are allowed")
        self.check_ids("stop_token_ids", stop_set)

    def _check_bias(self, sampling: SamplingRow) -> None:
        if not sampling.bias_token_ids and not sampling.bias_values:
            return  # as it mostly is: the checks below cost as much as all others together
        ids = as_token_ids("bias_token_ids", sampling.bias_token_ids)
        if len(sampling.bias_values) != len(sampling.bias_token_ids):
            raise Refused(
                "bias_values", f"{len(sampling.bias_values)} bytes of float32 for {ids.size} token ids; one each"
            )
        if ids.size > MAX_BIASED_TOKENS:
            raise Refused("bias_token_ids", f"{ids.size} token ids; at most {MAX_BIASED_TOKENS} are allowed")
        self.check_ids("bias_token_ids", ids)
        if np.unique(ids).size != ids.size:
            raise Refused("bias_token_ids", "a token id stands there twice")
        if not np.isfinite(np.frombuffer(sampling.bias_values, "<f4")).all():
            raise Refused("bias_values", "a value is not finite")

    def _check_bad_words(self, bad_words: list[bytes]) -> None:
        if len(bad_words) > MAX_BAD_WORDS:
            raise Refused("bad_words", f"{len(bad_words)} token sequences; at most {MAX_BAD_WORDS} are allowed")
        num_tokens = sum(map(len, bad_words)) // _ENTRY_BYTES
        if num_tokens > MAX_BAD_WORD_TOKENS:
            raise Refused("bad_words", f"{num_tokens} tokens in all; at most {MAX_BAD_WORD_TOKENS} are allowed")
        for index, word in enumerate(bad_words):
            ids = as_token_ids("bad_words", word)
            if not ids.size:
                raise Refused("bad_words", f"token sequence {index} is empty; it needs at least one token")
            self.check_ids("bad_words", ids)

    def _check_logprobs(self, message: EngineCoreRequest) -> None:
        sampling, num_prompt_tokens = message.sampling, len(message.prompt_token_ids) // _ENTRY_BYTES
        self._check_num_logprobs("logprobs", sampling.logprobs, self._max_num_seqs, "requests that run at once")
        self._check_num_logprobs("prompt_logprobs", sampling.prompt_logprobs, num_prompt_tokens, "prompt tokens")
        if sampling.logprobs is not None and not message.stream:
            raise Refused("logprobs", "log probabilities are reported to streaming requests only")

    def _check_num_logprobs(self, field: str, number: int | None, num_places: int, what: str) -> None:
        """`number` for each of `num_places` must be known tokens, and not too much for one frame."""
        if number is None:
            return
        vocabulary = self._num_valid_token_ids
        if not -1 <= number <= vocabulary:
            raise Refused(field, f"{field}={number} must lie between -1 (all) and the vocabulary's {vocabulary} tokens")
        num_bytes = num_places * (1 + (vocabulary if number == -1 else number)) * _LOGPROB_BYTES
        if num_bytes > _MAX_LOGPROB_BYTES:
            raise Refused(
                field,
                f"{field}={number} for {num_places} {what} would take {num_bytes} bytes in one message; "
                f"{_MAX_LOGPROB_BYTES} are allowed",
            )

    def _check_logits_processors(self, processors: list[tuple[str, str]]) -> None:
        if len(processors) > MAX_LOGITS_PROCESSORS:
            raise Refused(
                "logits_processors", f"{len(processors)} processors; at most {MAX_LOGITS_PROCESSORS} are allowed"
            )
        for name, argument in processors:
            if name not in self._logits_processors:
                known = ", ".join(self._logits_processors) or "none; they are named at the engine's start"
                raise Refused("logits_processors", f"{_shown(name)} is not loaded; known: {known}")
            _check_argument(name, argument)


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raises Refused unless `value` is finite and in [low, high]."""
    if not (math.isfinite(value) and low <= value <= high):
        raise Refused(name, f"{name}={value} must be a finite number between {low} and {high}")


def as_token_ids(field: str, token_ids: bytes) -> TokenIds:
    """Raises Refused where the bytes are no whole number of ids."""
    if len(token_ids) % _ENTRY_BYTES:
        raise Refused(field, f"{len(token_ids)} bytes are no whole number of int32 token ids")
    return np.frombuffer(token_ids, "<i4")


def _ranges(sampling: SamplingRow) -> Iterator[tuple[str, float, float, float]]:
    yield "temperature", sampling.temperature, 0.0, math.inf
    yield "top_k", sampling.top_k, 0, MAX_TOP_K
    yield "top_p", sampling.top_p, 0.0, 1.0
    yield "min_p", sampling.min_p, 0.0, 1.0
    yield "seed", sampling.seed, -(2**63), 2**63 - 1
    yield "sample_index", sampling.sample_index, 0, 0
    yield "min_tokens", sampling.min_tokens, 0, MAX_TOKENS
    yield "presence_penalty", sampling.presence_penalty, -2.0, 2.0
    yield "frequency_penalty", sampling.frequency_penalty, -2.0, 2.0
    yield "repetition_penalty", sampling.repetition_penalty, _FLOAT32_SMALLEST, _FLOAT32_MAX


def _check_timeout(timeout_s: float | None) -> None:
    if timeout_s is not None and not 0 < timeout_s <= MAX_TIMEOUT_S:
        raise Refused("timeout_s", f"timeout_s={timeout_s} must be greater than 0 and at most {MAX_TIMEOUT_S} seconds")


def _check_cache_salt(cache_salt: str) -> None:
    if len(cache_salt) > MAX_CACHE_SALT_CHARACTERS:
        raise Refused("cache_salt", f"{len(cache_salt)} characters; at most {MAX_CACHE_SALT_CHARACTERS} are allowed")


def _check_argument(name: str, argument: str) -> None:
    """A processor's argument is read by the worker in the middle of a step, so it must be JSON when it gets there."""
    if len(argument) > MAX_PROCESSOR_ARGUMENT_CHARACTERS:
        raise Refused(
            "logits_processors",
            f"the argument of {name} has {len(argument)} characters; {MAX_PROCESSOR_ARGUMENT_CHARACTERS} are allowed",
        )
    try:
        msgspec.json.decode(argument)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise Refused("logits_processors", f"the argument of {name} is no JSON: {error}") from error


def _shown(name: str) -> str:
    return repr(name if len(name) <= 80 else name[:77] + "...")
