"""Sampling parameters, the model's defaults and its vocabulary → the numbers that the worker samples by.

Checked here is what needs the vocabulary: that ids are tokens, which tokens a bad word is spelled with, and that the
constraints known now leave at least one token to begin an answer with.
"""

import struct
from collections.abc import Iterable, Sequence

from folovllm.common.errors import RequestError
from folovllm.common.messages.core_worker import SamplingRow
from folovllm.common.sampling_params import GREEDY_TEMPERATURE, MAX_BIAS, SamplingParams
from folovllm.frontend import int32
from folovllm.frontend.generation_defaults import ModelDefaults
from folovllm.frontend.tokenizer import Tokenizer

# Logits times this stay finite in float32 and are long past telling apart: a stronger penalty changes nothing.
_LARGEST_REPETITION_PENALTY = 1e6
_MAX_BAD_WORD_TOKENS = 1024  # of all bad words together


def sampling_row(
    params: SamplingParams,
    defaults: ModelDefaults,
    *,
    stop_token_ids: Sequence[int],
    tokenizer: Tokenizer | None,
    num_ids: int,
) -> SamplingRow:
    """What the worker is told about a request, but for its seed. Raises RequestError, naming the field at fault.

    Args:
        params: as the user gave them.
        defaults: the model's, for what `params` leave open.
        stop_token_ids: the whole stop set.
        tokenizer: None: the model has none; bad words are refused then.
        num_ids: ids are below this.
    """
    bad_words = bad_word_ids(params.bad_words or (), tokenizer)
    allowed = list(dict.fromkeys(params.allowed_token_ids or ()))
    bias = params.logit_bias or {}
    check_known("allowed_token_ids", allowed, num_ids)
    check_known("logit_bias", bias, num_ids)
    check_known("bad_words", (token_id for word in bad_words for token_id in word), num_ids)
    _check_something_is_left(allowed, bad_words, stop_token_ids if params.min_tokens else ())
    penalty = defaults.repetition_penalty if params.repetition_penalty is None else params.repetition_penalty
    temperature, top_k, top_p, min_p = _filters(params, defaults, num_ids)
    return SamplingRow(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        min_tokens=params.min_tokens,
        stop_token_ids=int32.pack(stop_token_ids),
        presence_penalty=float(params.presence_penalty),
        frequency_penalty=float(params.frequency_penalty),
        repetition_penalty=min(max(penalty, 1 / _LARGEST_REPETITION_PENALTY), _LARGEST_REPETITION_PENALTY),
        bias_token_ids=int32.pack(list(bias)),
        bias_values=struct.pack(f"<{len(bias)}f", *(min(max(value, -MAX_BIAS), MAX_BIAS) for value in bias.values())),
        allowed_token_ids=int32.pack(allowed),
        bad_words=[int32.pack(word) for word in bad_words],
        logprobs=_num_logprobs(params.logprobs, num_ids),
        prompt_logprobs=_num_logprobs(params.prompt_logprobs, num_ids),
        logits_processors=params.processor_arguments(),
    )


def prompt_only_row(row: SamplingRow) -> SamplingRow:
    """For a request that wants its prompt's log probabilities and no token: the one that comes with them is dropped."""
    return SamplingRow(prompt_logprobs=row.prompt_logprobs)


def check_known(field: str, ids: Iterable[int], num_ids: int) -> None:
    """Raises RequestError for an id that no token has."""
    for i, token_id in enumerate(ids):
        if token_id >= num_ids:
            place = f"{field}[{i}]={token_id}" if field.endswith("_ids") else f"{field}: {token_id}"
            raise RequestError(f"{place} is no token of this model: ids are 0 to {num_ids - 1}", field)


def bad_word_ids(words: Sequence[str], tokenizer: Tokenizer | None) -> list[list[int]]:
    """Every spelling of the words in tokens, with a blank in front and without; each once.

    Blanks that a word begins with are taken off first, as both spellings are banned anyway; a word of blanks alone is
    banned as it is. The spelling with a blank is left out where it is the other one behind a token for the blank, which
    would ban nothing more.
    """
    if words and tokenizer is None:
        raise RequestError("this model has no tokenizer: bad_words, which are texts, cannot be used", "bad_words")
    spellings: dict[tuple[int, ...], None] = {}
    for i, word in enumerate(words):
        assert tokenizer is not None
        for ids in _spellings(word, tokenizer):
            if not ids:
                raise RequestError(f"bad_words[{i}]={word[:80]!r}: the tokenizer makes no token of it", "bad_words")
            spellings[ids] = None
    num_tokens = sum(map(len, spellings))
    if num_tokens > _MAX_BAD_WORD_TOKENS:
        raise RequestError(
            f"bad_words are {num_tokens} tokens in all spellings; at most {_MAX_BAD_WORD_TOKENS} are allowed",
            "bad_words",
        )
    return [list(ids) for ids in spellings]


def _spellings(word: str, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    bare = word.lstrip(" ")
    if not bare:
        return [tuple(tokenizer.encode(word, add_special_tokens=False))]
    plain, spaced = (tuple(tokenizer.encode(text, add_special_tokens=False)) for text in (bare, " " + bare))
    return [plain] if spaced[-len(plain) :] == plain else [plain, spaced]


def _check_something_is_left(
    allowed: Sequence[int], bad_words: Sequence[Sequence[int]], masked_at_first: Sequence[int]
) -> None:
    """A first token must be possible; what leaves nothing later ends the request then, with its reason."""
    banned = {word[0] for word in bad_words if len(word) == 1}
    if not allowed or not banned.union(masked_at_first).issuperset(allowed):
        return
    cause = "bad_words bans them all"
    if not banned.issuperset(allowed):
        cause = "min_tokens bans those that end the answer" + (" and bad_words the others" if banned else "")
    raise RequestError(f"allowed_token_ids leave no token to begin with: {cause}", "allowed_token_ids")


def _filters(params: SamplingParams, defaults: ModelDefaults, num_ids: int) -> tuple[float, int, float, float]:
    """temperature, top_k, top_p and min_p; neutral ones where the most likely token is taken anyway."""
    temperature = defaults.temperature if params.temperature is None else params.temperature
    if temperature < GREEDY_TEMPERATURE:  # also keeps a tiny temperature from overflowing
        return 0.0, 0, 1.0, 0.0
    top_k = defaults.top_k if params.top_k is None else params.top_k
    return (
        float(temperature),
        top_k if 0 < top_k < num_ids else 0,
        float(defaults.top_p if params.top_p is None else params.top_p),
        float(defaults.min_p if params.min_p is None else params.min_p),
    )


def _num_logprobs(asked: int | None, num_ids: int) -> int | None:
    return -1 if asked is not None and asked >= num_ids else asked
