"""Sampling parameters as the user gives them, checked when they are made.

What depends on the model (ids below its vocabulary, a prompt's length) is checked where a request is made of them.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from folovllm.common.errors import RequestError
from folovllm.common.structured_outputs import StructuredOutputsParams

GREEDY_TEMPERATURE = 1e-5  # below it the most likely token is taken: dividing by it would say the same, or overflow
MAX_N = 128
MAX_STOP_STRINGS = 256
MAX_STOP_CHARACTERS = 4096
MAX_STOP_TOKEN_IDS = 1024
MAX_TOP_K = 2**31 - 1
MAX_TOKENS = 2**31 - 1
MAX_LOGPROBS = 1024  # one step of 256 such requests is 2 MB of log probabilities
MAX_BIASED_TOKENS = 1024
MAX_BIAS = 100.0  # OpenAI's bound: no logit stands out by more, so it bans, or forces, in effect
MAX_BAD_WORDS = 128
MAX_BAD_WORD_CHARACTERS = 256
MAX_LOGITS_PROCESSORS = 16
MAX_PROCESSOR_ARGUMENT_CHARACTERS = 65536
MAX_TIMEOUT_S = 7 * 86400.0


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the tokens of one request are chosen, when it ends and what is reported. Names and meaning follow vLLM.

    temperature, top_k, top_p, min_p and repetition_penalty left at None take the model's `generation_config.json`, and
    where that is silent 1.0, -1 (all tokens), 1.0, 0.0 and 1.0. An explicit value always wins, also 0 and 1.

    Attributes:
        n: number of answers to one prompt, 1 to 128.
        temperature: ≥ 0; 0 is greedy, and so is everything below 1e-5.
        top_k: keep the k most likely tokens; -1 or 0 keep all.
        top_p: keep the most likely tokens whose probabilities add up to top_p, in (0, 1].
        min_p: drop tokens less likely than min_p times the most likely one, in [0, 1].
        presence_penalty: taken off the logit of every token that the answer holds already, in [-2, 2].
        frequency_penalty: taken off as often as the answer holds the token, in [-2, 2].
        repetition_penalty: > 0; divides positive and multiplies negative logits of tokens in the prompt or the answer.
        logit_bias: token id → what is added to its logit; at most 1024 tokens; values beyond ±100 are taken as ±100.
        allowed_token_ids: only these tokens may be chosen; at least one id.
        bad_words: texts that the answer must not hold, with a blank before them or without; at most 128.
        seed: any 64-bit integer; None draws one. The same seed, prompt and parameters give the same answer.
        max_tokens: most tokens to generate; None means as many as the model's length allows.
        min_tokens: no stop (end of sequence, stop token, stop string) ends the answer before this many tokens.
        stop: a string or list of strings that end the answer.
        stop_token_ids: token ids that end the answer, besides the model's own end-of-sequence ids.
        ignore_eos: go on past the model's end-of-sequence ids.
        include_stop_str_in_output: keep the stop string at the end of the text.
        skip_special_tokens: leave special tokens out of the text.
        detokenize: False gives token ids alone and no text; it does not go with stop strings.
        logprobs: report each token's log probability and those of the `logprobs` most likely tokens (0: the token's
            alone; at most 1024; -1: the whole vocabulary, which costs a dictionary of that size for each token). They
            are the network's own, before temperature, penalties, biases and masks.
        prompt_logprobs: the same for each token of the prompt but the first. The prompt is then computed whole.
        truncate_prompt_tokens: keep only the last so many tokens of the prompt; -1: as many as leave room for
            `min_tokens`, and for one token at least.
        timeout_s: seconds from the engine's receipt after which the answer ends, finish_reason "timeout"; > 0.
        skip_reading_prefix_cache: compute the whole prompt, whatever the prefix cache has of it. None: only where
            prompt_logprobs need it.
        structured_outputs: what the answer's text must look like.
        logits_processors: names of processors that the engine has loaded, in the order in which they are applied, or
            name → argument (anything that JSON can express; without one: null).

    Raises:
        RequestError: a value is out of its range; the message names field, value and range.
    """

    n: int = 1
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    detokenize: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    truncate_prompt_tokens: int | None = None
    timeout_s: float | None = None
    skip_reading_prefix_cache: bool | None = None
    structured_outputs: StructuredOutputsParams | None = None
    logits_processors: dict[str, Any] | list[str] | None = None

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            check(name, getattr(self, name))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens={self.min_tokens} is greater than max_tokens={self.max_tokens}", "min_tokens"
            )
        if self.stop_list() and not self.detokenize:
            raise RequestError("stop needs the answer's text: detokenize=False does not go with it", "stop")
        if self.prompt_logprobs is not None and self.skip_reading_prefix_cache is False:
            raise RequestError(
                "prompt_logprobs need the whole prompt computed: skip_reading_prefix_cache=False does not go with them",
                "skip_reading_prefix_cache",
            )

    def stop_list(self) -> list[str]:
        """`stop` as a list, whichever of its three forms was given."""
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else list(self.stop)

    def processor_arguments(self) -> list[tuple[str, str]]:
        """`logits_processors` as (name, argument as JSON), in order."""
        given = self.logits_processors or []
        named = given if isinstance(given, Mapping) else dict.fromkeys(given)
        return [(name, _as_json("logits_processors", argument)) for name, argument in named.items()]


_Check = Callable[[str, Any], None]


def _whole(low: int, high: int) -> _Check:
    def check(name: str, value: Any) -> None:
        if value is None:
            return
        if isinstance(value, bool) or not isinstance(value, int):
            raise RequestError(f"{name}={_shown(value)} must be a whole number", name)
        if not low <= value <= high:
            raise RequestError(f"{name}={_shown(value)} must lie between {low} and {high}", name)

    return check


def _number(low: float, high: float) -> _Check:
    def check(name: str, value: Any) -> None:
        if value is None:
            return
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise RequestError(f"{name}={_shown(value)} must be a number", name)
        if not (_is_finite(value) and low <= value <= high):
            raise RequestError(f"{name}={_shown(value)} must be a finite number between {low} and {high}", name)

    return check


def _positive(high: float, hint: str = "") -> _Check:
    in_range = _number(0.0, high)

    def check(name: str, value: Any) -> None:
        in_range(name, value)
        if value == 0:
            limit = "" if math.isinf(high) else f" and at most {high:g}"
            raise RequestError(f"{name}=0 must be greater than 0{limit}{hint}", name)

    return check


def _given(check: _Check) -> _Check:
    """The same, and None is refused."""

    def checked(name: str, value: Any) -> None:
        if value is None:
            raise RequestError(f"{name} must not be None", name)
        check(name, value)

    return checked


def _flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise RequestError(f"{name}={_shown(value)} must be True or False", name)


def _optional_flag(name: str, value: Any) -> None:
    if value is not None:
        _flag(name, value)


def _texts(most: int, most_characters: int) -> _Check:
    """A list of at most so many texts, none of them empty."""

    def check(name: str, value: Any) -> None:
        if value is None:
            return
        if not isinstance(value, list | tuple):
            raise RequestError(f"{name} must be a list of strings, not {type(value).__name__}", name)
        if len(value) > most:
            raise RequestError(f"{name} has {len(value)} strings; at most {most} are allowed", name)
        for i, text in enumerate(value):
            if not isinstance(text, str):
                raise RequestError(f"{name}[{i}] must be a string, not {type(text).__name__}", name)
            if not text:
                raise RequestError(f"{name}[{i}] is empty; it needs at least one character", name)
            if len(text) > most_characters:
                raise RequestError(f"{name}[{i}] has {len(text)} characters; at most {most_characters}", name)

    return check


def _stop(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, str | list | tuple):
        raise RequestError(f"{name} must be a string or a list of strings, not {type(value).__name__}", name)
    _texts(MAX_STOP_STRINGS, MAX_STOP_CHARACTERS)(name, [value] if isinstance(value, str) else value)


def _ids(least: int, most: int) -> _Check:
    """A list of between so many token ids; that the model has them is checked with the prompt."""

    def check(name: str, value: Any) -> None:
        if value is None:
            return
        if not isinstance(value, list | tuple):
            raise RequestError(f"{name} must be a list of token ids, not {type(value).__name__}", name)
        if len(value) < least:
            raise RequestError(f"{name} has {len(value)} ids; at least {least} is needed", name)
        if len(value) > most:
            raise RequestError(f"{name} has {len(value)} ids; at most {most} are allowed", name)
        if set(map(type, value)) == {int} and min(value) >= 0:  # the usual case, without a loop
            return
        for i, token_id in enumerate(value):
            _check_id(f"{name}[{i}]", token_id, name)

    return check


def _check_id(shown_name: str, token_id: Any, field: str) -> None:
    if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
        raise RequestError(f"{shown_name}={_shown(token_id)} must be a token id ≥ 0", field)


def _bias(name: str, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, Mapping):
        raise RequestError(f"{name} must be a dict, token id → number, not {type(value).__name__}", name)
    if len(value) > MAX_BIASED_TOKENS:
        raise RequestError(f"{name} has {len(value)} tokens; at most {MAX_BIASED_TOKENS} are allowed", name)
    for token_id, bias in value.items():
        _check_id(f"{name}'s key", token_id, name)
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not _is_finite(bias):
            raise RequestError(f"{name}[{token_id}]={_shown(bias)} must be a finite number from -100 to 100", name)


def _structured(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, StructuredOutputsParams):
        raise RequestError(f"{name} must be a StructuredOutputsParams, not {type(value).__name__}", name)


def _processors(name: str, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, Mapping | list | tuple):
        raise RequestError(f"{name} must be a list of names or a dict of arguments, not {type(value).__name__}", name)
    if len(value) > MAX_LOGITS_PROCESSORS:
        raise RequestError(f"{name} has {len(value)} entries; at most {MAX_LOGITS_PROCESSORS} are allowed", name)
    for processor in value:
        if not isinstance(processor, str) or not processor:
            raise RequestError(f"{name}: a name must be a string, not {_shown(processor)}", name)
    if len(set(value)) < len(value):
        raise RequestError(f"{name} has a name twice", name)
    for argument in value.values() if isinstance(value, Mapping) else ():
        _as_json(name, argument)


def _as_json(name: str, argument: Any) -> str:
    try:
        text = json.dumps(argument, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{name}: JSON cannot express the argument {_shown(argument)}: {error}", name) from error
    if len(text) > MAX_PROCESSOR_ARGUMENT_CHARACTERS:
        raise RequestError(
            f"{name}: an argument has {len(text)} characters as JSON; at most {MAX_PROCESSOR_ARGUMENT_CHARACTERS}", name
        )
    return text


def _truncation(name: str, value: Any) -> None:
    _whole(-1, MAX_TOKENS)(name, value)
    if value == 0:
        raise RequestError(f"{name}=0 must be at least 1, or -1 (as many as fit): a prompt has a token", name)


def _is_finite(value: float) -> bool:
    """Whether a float can hold it: a whole number may be too large."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _shown(value: object) -> str:
    """`value` for an error message, cut so that bad input is never echoed at length."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


_CHECKS: dict[str, _Check] = {
    "n": _given(_whole(1, MAX_N)),
    "temperature": _number(0.0, math.inf),
    "top_k": _whole(-1, MAX_TOP_K),
    "top_p": _positive(1.0, "; use temperature=0 for greedy"),
    "min_p": _number(0.0, 1.0),
    "presence_penalty": _given(_number(-2.0, 2.0)),
    "frequency_penalty": _given(_number(-2.0, 2.0)),
    "repetition_penalty": _positive(math.inf),
    "logit_bias": _bias,
    "allowed_token_ids": _ids(1, 2**20),
    "bad_words": _texts(MAX_BAD_WORDS, MAX_BAD_WORD_CHARACTERS),
    "seed": _whole(-(2**63), 2**63 - 1),
    "max_tokens": _whole(0, MAX_TOKENS),
    "min_tokens": _given(_whole(0, MAX_TOKENS)),
    "stop": _stop,
    "stop_token_ids": _ids(0, MAX_STOP_TOKEN_IDS),
    "ignore_eos": _flag,
    "include_stop_str_in_output": _flag,
    "skip_special_tokens": _flag,
    "detokenize": _flag,
    "logprobs": _whole(-1, MAX_LOGPROBS),
    "prompt_logprobs": _whole(-1, MAX_LOGPROBS),
    "truncate_prompt_tokens": _truncation,
    "timeout_s": _positive(MAX_TIMEOUT_S),
    "skip_reading_prefix_cache": _optional_flag,
    "structured_outputs": _structured,
    "logits_processors": _processors,
}
