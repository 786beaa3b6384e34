"""Log probabilities in the forms of the two completions endpoints."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from folovllm.frontend.outputs import Logprob
from folovllm.frontend.server.protocol.chat import ChoiceLogprobs, TokenLogprob, TopLogprob
from folovllm.frontend.server.protocol.completions import CompletionLogprobs
from folovllm.frontend.tokenizer import Tokenizer

Entries = Sequence[dict[int, Logprob] | None]

LOWEST = -9999.0  # JSON has no infinity; vLLM's clients know this number


def chat_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], entries: Sequence[dict[int, Logprob]], num_top: int
) -> ChoiceLogprobs:
    """One entry for each token, with the `num_top` likeliest tokens of its place."""
    return ChoiceLogprobs(content=_of_tokens(tokenizer, zip(token_ids, entries, strict=True), num_top))


def _of_tokens(
    tokenizer: Tokenizer, tokens: Iterable[tuple[int, dict[int, Logprob]]], num_top: int
) -> list[TokenLogprob]:
    content = []
    for token_id, entry in tokens:
        top = [TopLogprob(**_shown(tokenizer, *pair)) for pair in _likeliest(entry, num_top)]
        content.append(TokenLogprob(**_shown(tokenizer, token_id, entry[token_id]), top_logprobs=top))
    return content


def content_logprobs(
    tokenizer: Tokenizer,
    tokens: Sequence[tuple[int, dict[int, Logprob]]],
    text: str,
    content: str,
    num_top: int,
) -> list[TokenLogprob]:
    """As `chat_logprobs`, of those tokens that the end of a text is made of.

    Args:
        tokenizer: the model's.
        tokens: those of `text`, with their entries; more may follow that gave no text, such as the one that ended it.
        text: begins with thoughts, or their tags.
        content: what is left of it without them, its end.
        num_top: alternatives to report.
    """
    begin, end = len(text) - len(content), len(text)
    kept, place = [], 0
    for token_id, entry in tokens:
        behind = place + len(entry[token_id].decoded_token or "")
        if place < end and (behind > begin or place >= begin):  # a token without text belongs to the next character
            kept.append((token_id, entry))
        place = behind
    return _of_tokens(tokenizer, kept, num_top)


def tokens_behind(tokens: Sequence[tuple[int, dict[int, Logprob]]]) -> list[tuple[int, dict[int, Logprob]]]:
    """Those at the end that gave no text yet: the first bytes of a character, which the next piece of text shows."""
    start = len(tokens)
    while start and not tokens[start - 1][1][tokens[start - 1][0]].decoded_token:
        start -= 1
    return list(tokens[start:])


def _shown(tokenizer: Tokenizer, token_id: int, logprob: Logprob) -> dict[str, Any]:
    text = logprob.decoded_token or ""
    data = tokenizer.token_bytes(token_id) if tokenizer.byte_level else text.encode()
    return {"token": text, "logprob": finite(logprob.logprob), "bytes": list(data)}


def _likeliest(entry: Mapping[int, Logprob], count: int) -> list[tuple[int, Logprob]]:
    return sorted(entry.items(), key=lambda item: -item[1].logprob)[:count]


def finite(logprob: float) -> float:
    """A logprob that JSON can hold."""
    return max(logprob, LOWEST)


def completion_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], entries: Entries, num_top: int, *, first_offset: int
) -> CompletionLogprobs:
    """Parallel lists, one entry for each token; the first token of a prompt has no log probability.

    Args:
        tokenizer: gives the text of tokens without an entry.
        token_ids: the tokens.
        entries: of the tokens; None where there is none.
        num_top: alternatives to report.
        first_offset: where the first token's text begins in the answer's text.
    """
    found = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    offset = first_offset
    for token_id, entry in zip(token_ids, entries, strict=True):
        taken = None if entry is None else entry[token_id]
        text = taken.decoded_token if taken else tokenizer.decode([token_id], skip_special_tokens=False)
        found.tokens.append(text or "")
        found.token_logprobs.append(None if taken is None else finite(taken.logprob))
        found.top_logprobs.append(None if entry is None else _by_text(_likeliest(entry, num_top)))
        found.text_offset.append(offset)
        offset += len(text or "")
    return found


def _by_text(pairs: Iterable[tuple[int, Logprob]]) -> dict[str, float]:
    """Two tokens can have the same text; the likelier one, which comes first, is kept."""
    texts: dict[str, float] = {}
    for token_id, logprob in pairs:
        texts.setdefault(logprob.decoded_token or f"token_id:{token_id}", finite(logprob.logprob))
    return texts


def prompt_logprobs(entries: Entries | None) -> list[dict[int, dict[str, Any]] | None] | None:
    """A prompt's log probabilities in vLLM's form: token id → log probability, rank and text."""
    if entries is None:
        return None
    return [None if entry is None else _by_id(entry) for entry in entries]


def _by_id(entry: Mapping[int, Logprob]) -> dict[int, dict[str, Any]]:
    return {
        token_id: {"logprob": finite(value.logprob), "rank": value.rank, "decoded_token": value.decoded_token}
        for token_id, value in entry.items()
    }
