"""`/v1/completions`: OpenAI's reference, with vLLM's extras."""

from typing import Any, Literal

import msgspec

from folovllm.frontend.server.protocol.common import Usage
from folovllm.frontend.server.protocol.sampling import SamplingFields


class CompletionRequest(SamplingFields, kw_only=True, forbid_unknown_fields=True):
    """Body of `POST /v1/completions`.

    Attributes:
        prompt: a text, token ids, or a list of several of either.
        max_tokens: most tokens of each answer; null is 16.
        echo: the answer begins with the prompt.
        logprobs: report log probabilities, and so many alternatives with each (0: the taken token's alone).
        best_of: only null, or the same as `n`.
        suffix: not supported: models are not asked to fill gaps.
        add_special_tokens: whether the tokenizer adds its own to a text (bos).
    """

    prompt: str | list[str | int | list[int]]
    max_tokens: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None
    suffix: str | None = None
    add_special_tokens: bool | None = None


class CompletionLogprobs(msgspec.Struct, kw_only=True):
    """Log probabilities of an answer, one entry for each token; with `echo` also of the prompt, the first one null."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


CompletionFinishReason = Literal["stop", "length", "abort", "timeout", "error"]


class CompletionChoice(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One answer, or in a stream what is new of it. Answers to prompt i have the indices `i * n` to `i * n + n - 1`."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: CompletionFinishReason | None
    stop_reason: int | str | None = None
    prompt_logprobs: list[dict[int, dict[str, Any]] | None] | None = None


class Completion(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The whole answer, or one event of a stream."""

    id: str
    object: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
