"""Parts of several answers: token counts, errors."""

import msgspec


class PromptTokensDetails(msgspec.Struct, kw_only=True):
    """Of the prompt's tokens, those taken from the prefix cache."""

    cached_tokens: int = 0


class CompletionTokensDetails(msgspec.Struct, kw_only=True):
    """Of the answers' tokens, those of reasoning."""

    reasoning_tokens: int = 0


class Usage(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Token counts of a request: the prompt once, the answers summed up."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None
    completion_tokens_details: CompletionTokensDetails | None = None


class ErrorBody(msgspec.Struct, kw_only=True):
    """What went wrong.

    Attributes:
        message: for people; it never repeats the input at length.
        type: kind of error, such as "invalid_request_error".
        param: the field at fault, null where there is no single one.
        code: a word for programs, such as "context_length_exceeded", null where the type says it all.
    """

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(msgspec.Struct, kw_only=True):
    """OpenAI's form of an error."""

    error: ErrorBody
