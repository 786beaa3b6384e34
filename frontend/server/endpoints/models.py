"""`/v1/models`, `/tokenize`, `/detokenize`."""

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from folovllm.common.errors import RequestError
from folovllm.frontend.server.context import ServerContext, json_response
from folovllm.frontend.server.conversation import to_messages, to_tools
from folovllm.frontend.server.endpoint import Endpoint
from folovllm.frontend.server.errors import ApiError
from folovllm.frontend.server.protocol.common import ErrorAnswer
from folovllm.frontend.server.protocol.models import (
    DetokenizeAnswer,
    DetokenizeRequest,
    ModelCard,
    ModelList,
    TokenizeAnswer,
    TokenizeRequest,
)


class Models:
    """Which models there are, and their tokens."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context
        self._read_tokenize = context.reader(TokenizeRequest)
        self._read_detokenize = context.reader(DetokenizeRequest)

    async def list(self, _request: Request) -> Response:
        return json_response(ModelList(data=[self._card(name) for name in self._context.model_names]))

    async def one(self, request: Request) -> Response:
        return json_response(self._card(self._context.check_model(request.path_params["model"])))

    def _card(self, name: str) -> ModelCard:
        context = self._context
        return ModelCard(
            id=name,
            created=context.created,
            root=context.model_names[0],
            max_model_len=context.llm.info.max_model_len,
        )

    async def tokenize(self, request: Request) -> Response:
        body = await self._read_tokenize.read(request)
        self._context.check_model(body.value.model)
        tokenizer = self._context.need_tokenizer()
        text, special = self._text(body.value)
        ids = tokenizer.encode(text, add_special_tokens=special)
        strings = tokenizer.convert_ids_to_tokens(ids) if body.value.return_token_strs else None
        answer = TokenizeAnswer(
            count=len(ids), max_model_len=self._context.llm.info.max_model_len, tokens=ids, token_strs=strings
        )
        return json_response(answer, ignored=body.ignored)

    def _text(self, body: TokenizeRequest) -> tuple[str, bool]:
        """The text, and whether the tokenizer adds its special tokens."""
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give either prompt or messages", param="prompt")
        if body.prompt is not None:
            return body.prompt, body.add_special_tokens is not False
        assert body.messages is not None, "one of the two is given"
        options: dict[str, Any] = {
            "add_generation_prompt": body.add_generation_prompt is not False,
            "continue_final_message": bool(body.continue_final_message),
            "tools": to_tools(body.tools),
            "chat_template_kwargs": body.chat_template_kwargs,
        }
        rendered = self._context.llm.render_chat(to_messages(body.messages), **options)
        return rendered.text, bool(body.add_special_tokens)

    async def detokenize(self, request: Request) -> Response:
        body = await self._read_detokenize.read(request)
        self._context.check_model(body.value.model)
        tokenizer, ids = self._context.need_tokenizer(), body.value.tokens
        if any(not 0 <= token_id < tokenizer.num_ids for token_id in ids):
            raise RequestError(f"tokens must be ids from 0 to {tokenizer.num_ids - 1}", "tokens")
        return json_response(
            DetokenizeAnswer(prompt=tokenizer.decode(ids, skip_special_tokens=False)), ignored=body.ignored
        )


def endpoints(context: ServerContext) -> list[Endpoint]:
    """The endpoints of this module."""
    models = Models(context)
    return [
        Endpoint("GET", "/v1/models", models.list, "All models", answer=ModelList),
        Endpoint(
            "GET", "/v1/models/{model:path}", models.one, "One model", answer=ModelCard, errors=((404, ErrorAnswer),)
        ),
        Endpoint("POST", "/tokenize", models.tokenize, "Tokens of a text", body=TokenizeRequest, answer=TokenizeAnswer),
        Endpoint(
            "POST",
            "/detokenize",
            models.detokenize,
            "Text of tokens",
            body=DetokenizeRequest,
            answer=DetokenizeAnswer,
        ),
    ]
