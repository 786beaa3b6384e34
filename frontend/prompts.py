"""The forms in which a prompt can be given, and what is wrong with one that is none of them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

from folovllm.common.errors import RequestError

MAX_CACHE_SALT_CHARACTERS = 256


class TextPrompt(TypedDict):
    """A prompt as text. cache_salt: only requests with the same one share what is computed of their prompts."""

    prompt: str
    cache_salt: NotRequired[str]


class TokensPrompt(TypedDict):
    """A prompt as token ids; nothing is put in front of them. cache_salt: as for TextPrompt."""

    prompt_token_ids: Sequence[int]
    cache_salt: NotRequired[str]


@dataclasses.dataclass(frozen=True, slots=True)
class RenderedChat:
    """A conversation as the chat template wrote it, special tokens included: the tokenizer adds none."""

    text: str
    cache_salt: str | None = None


Prompt = str | Sequence[int] | TextPrompt | TokensPrompt | RenderedChat


def as_list(prompts: Any) -> tuple[bool, Sequence[Any]]:
    """Whether a list of prompts was given, and the prompts. A list of ints is one prompt."""
    if isinstance(prompts, str | Mapping | RenderedChat):
        return False, [prompts]
    if isinstance(prompts, bytes) or not isinstance(prompts, Sequence):
        raise RequestError(
            f"prompts must be a string, token ids, a dict or a list of these, not {type(prompts).__name__}", "prompts"
        )
    if not prompts:
        raise RequestError("prompts is an empty list: it holds neither a prompt nor a token id", "prompts")
    if isinstance(prompts[0], str | Mapping | RenderedChat | Sequence):
        return True, prompts
    return False, [prompts]


def unwrapped(prompt: Any) -> tuple[Any, str]:
    """What the prompt is, text or ids, and its cache salt."""
    if isinstance(prompt, RenderedChat):
        return prompt.text, _checked_salt(prompt.cache_salt)
    if not isinstance(prompt, Mapping):
        return prompt, ""
    keys = set(prompt) - {"cache_salt"}
    if keys not in ({"prompt"}, {"prompt_token_ids"}):
        shown = ", ".join(sorted(str(key)[:40] for key in keys)) or "none"
        raise RequestError(
            f"a prompt dict has either prompt or prompt_token_ids, and perhaps cache_salt; got {shown}", "prompt"
        )
    (key,) = keys
    value = prompt[key]
    if key == "prompt" and not isinstance(value, str):
        raise RequestError(f"prompt must be a string, not {type(value).__name__}", "prompt")
    if key == "prompt_token_ids" and isinstance(value, str):
        raise RequestError("prompt_token_ids must be a list of token ids, not str", "prompt_token_ids")
    return value, _checked_salt(prompt.get("cache_salt"))


def _checked_salt(salt: Any) -> str:
    if salt is None:
        return ""
    if not isinstance(salt, str) or not 0 < len(salt) <= MAX_CACHE_SALT_CHARACTERS or not salt.isprintable():
        raise RequestError(
            f"cache_salt must be a string of 1 to {MAX_CACHE_SALT_CHARACTERS} printable characters", "cache_salt"
        )
    return salt


def checked_ids(ids: Any, num_ids: int) -> list[int]:
    """A prompt's ids as a list of their own; each must be a token, and there must be one."""
    if isinstance(ids, bytes) or not isinstance(ids, Sequence):
        raise RequestError(
            f"a prompt must be text or a list of token ids, not {type(ids).__name__}", "prompt_token_ids"
        )
    if not ids:
        raise RequestError("prompt_token_ids is empty: a prompt has at least one token", "prompt_token_ids")
    if set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < num_ids:  # the usual case, without a loop
        return list(ids)
    for i, value in enumerate(ids):
        if type(value) is not int:
            raise RequestError(
                f"prompt_token_ids[{i}] must be a token id (int), not {type(value).__name__}", "prompt_token_ids"
            )
        if not 0 <= value < num_ids:
            raise RequestError(
                f"prompt_token_ids[{i}]={value} is no token of this model: ids are 0 to {num_ids - 1}",
                "prompt_token_ids",
            )
    raise AssertionError("one of the ids failed the check above")
