"""`/v1/models`, `/tokenize`, `/detokenize`, `/version`, `/health`."""

from typing import Any

import msgspec

from folovllm.frontend.server.protocol.chat import ChatMessage
from folovllm.frontend.server.protocol.tools import Tool


class ModelCard(msgspec.Struct, kw_only=True):
    """A model that can be asked for.

    Attributes:
        id: its name.
        created: when this server was started, in seconds since the epoch.
        object, owned_by: as OpenAI's clients want them.
        root: the first name of the same model.
        max_model_len: longest prompt + answer in tokens.
    """

    id: str
    created: int
    root: str
    max_model_len: int
    object: str = "model"
    owned_by: str = "folovllm"


class ModelList(msgspec.Struct, kw_only=True):
    """All names."""

    data: list[ModelCard]
    object: str = "list"


class TokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A text or a conversation whose tokens are wanted; exactly one of `prompt` and `messages`.

    Attributes:
        model: one of the names that `/v1/models` lists; null is the one that is served.
        prompt: the text.
        messages: the conversation.
        tools: as for chats; only with `messages`.
        add_special_tokens: whether the tokenizer adds its own; by default to a text, and not to a conversation.
        add_generation_prompt: whether the answer's beginning follows the conversation; true by default.
        continue_final_message: the last message is left open instead.
        chat_template_kwargs: variables of the chat template.
        return_token_strs: also give the tokens as the vocabulary spells them.
    """

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class TokenizeAnswer(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Token ids, their number, and where asked for their spelling in the vocabulary."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str | None] | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Token ids whose text is wanted, special tokens included.

    Attributes:
        tokens: the ids.
        model: one of the names that `/v1/models` lists; null is the one that is served.
    """

    tokens: list[int]
    model: str | None = None


class DetokenizeAnswer(msgspec.Struct, kw_only=True):
    """The text."""

    prompt: str


class VersionAnswer(msgspec.Struct, kw_only=True):
    """FoloVLLM's version."""

    version: str


class HealthAnswer(msgspec.Struct, kw_only=True):
    """State of the server; why, if it is not ready.

    Attributes:
        status: "ready", "draining" (the server ends), "recovering" (the engine starts a new worker), "stuck" (the
            engine does not answer) or "dead".
        message: why; "" if it is ready.
    """

    status: str
    message: str = ""
