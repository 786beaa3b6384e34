"""Arguments of the chat calls → rendered prompts."""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, cast

from folovllm.common.errors import RequestError
from folovllm.frontend.chat_template import ChatTemplate, Message
from folovllm.frontend.prompts import RenderedChat

Conversation = Sequence[Message]


class ChatOptions(TypedDict, total=False):
    """How a conversation becomes a prompt; see `ChatTemplate.render`. cache_salt: as in `TextPrompt`."""

    add_generation_prompt: bool
    continue_final_message: bool
    tools: Sequence[Mapping[str, Any]] | None
    chat_template_kwargs: Mapping[str, Any] | None
    cache_salt: str | None


def render(chat: ChatTemplate | None, messages: Conversation, options: ChatOptions) -> RenderedChat:
    """One conversation as prompt. Raises RequestError; TypeError for an option that does not exist."""
    unknown = sorted(set(options) - set(ChatOptions.__annotations__))
    if unknown:
        known = ", ".join(ChatOptions.__annotations__)
        raise TypeError(f"unexpected keyword argument {unknown[0]!r}; options of a chat are {known}")
    if chat is None:
        raise RequestError("this model has no tokenizer, so it cannot chat: use generate with token ids", "messages")
    variables = options.get("chat_template_kwargs") or {}
    reserved = sorted(set(variables) & (set(ChatOptions.__annotations__) | {"messages"}))
    if reserved:
        raise RequestError(f"chat_template_kwargs must not hold {', '.join(reserved)}", "chat_template_kwargs")
    text = chat.render(
        messages,
        add_generation_prompt=options.get("add_generation_prompt", True),
        continue_final_message=options.get("continue_final_message", False),
        tools=options.get("tools"),
        **variables,
    )
    return RenderedChat(text, options.get("cache_salt"))


def render_many(
    chat: ChatTemplate | None, messages: Conversation | Sequence[Conversation], options: ChatOptions
) -> RenderedChat | list[RenderedChat]:
    """One conversation, or each of a list of them."""
    if not (isinstance(messages, list | tuple) and messages and isinstance(messages[0], list | tuple)):
        return render(chat, cast("Conversation", messages), options)  # whatever else it is, `render` refuses
    rendered = []
    for i, conversation in enumerate(messages):
        try:
            rendered.append(render(chat, cast("Conversation", conversation), options))
        except RequestError as error:
            raise RequestError(f"conversation {i}: {error}", error.field) from error
    return rendered
