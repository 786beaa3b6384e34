"""A blocking client of OpenAI's chat API, ours or anybody's, over the standard library's HTTP.

A server's refusals are raised as what the engine raises for the same cause (`common/errors.py`), so that a face needs
no second way to tell of them.
"""

import http.client
import json
import ssl
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import msgspec

from folovllm.common.errors import ConfigError, EngineDeadError, QueueFullError, RequestError, RequestFailedError

_TIMEOUT_S = 10.0  # to connect, and for the list of models; a first token may take as long as it takes
_MAX_ERROR_BYTES = 20_000
_SHOWN = 300  # characters of an answer that an error repeats
_RETRY_S = 5.0  # where a server that is full does not say when to try again


class _Details(msgspec.Struct):
    message: str | None = None


class _ErrorAnswer(msgspec.Struct):
    error: _Details | str | None = None
    message: str | None = None  # some servers have no object around it


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    completion_tokens: int = 0


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: _Details | str | None = None


@dataclass(frozen=True, slots=True)
class ChatDelta:
    """What one event of a stream brought.

    Attributes:
        text: new text of the answer.
        reasoning: new text of the model's thoughts, where the server tells them apart.
        finish_reason: set once, at the end of the answer.
        num_tokens: tokens of the whole answer; in the last event, where the server counts them.
    """

    text: str = ""
    reasoning: str = ""
    finish_reason: str | None = None
    num_tokens: int | None = None


class OpenAIClient:
    """One server."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        """Connects to nothing yet.

        Args:
            url: http(s)://host[:port][/path], with or without /v1 at its end.
            api_key: sent as bearer; None sends none.

        Raises:
            ConfigError: `url` is none, or has a part that no request would have.
        """
        try:
            parts = urlsplit(url)
            self._host, self._port = parts.hostname or "", parts.port
        except ValueError as error:
            raise ConfigError(f"{url!r} is no URL: {error}") from error
        if parts.scheme not in ("http", "https") or not self._host:
            raise ConfigError(f"{url!r} is no URL of a server; write http://HOST:PORT")
        if parts.username is not None or parts.password is not None:
            raise ConfigError("the server's URL holds a user or a password, which is not sent; give a key by --api-key")
        if parts.query or parts.fragment:
            rest = f"?{parts.query}" if parts.query else f"#{parts.fragment}"
            raise ConfigError(f"the server's URL ends with {rest!r}, which is not sent; write http://HOST:PORT")
        self._is_secure = parts.scheme == "https"
        self._prefix = parts.path.rstrip("/").removesuffix("/v1") + "/v1"
        self._headers = {"Content-Type": "application/json", "Connection": "close"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self.url = url

    def models(self) -> list[str]:
        """The names of the models that the server has, at least one.

        Raises:
            EngineDeadError: nobody answers, or not in time.
            ConfigError: the key is wrong, or the answer is none of OpenAI's API.
        """
        with self._answer("GET", "/models", None, _TIMEOUT_S) as answer:
            if answer.status in (401, 403):
                raise self._refusal(answer)
            with self._talking():
                body = answer.read()
            try:
                names = [model.id for model in msgspec.json.decode(body, type=_Models).data]
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                kind = answer.headers.get_content_type()
                raise ConfigError(
                    f"{self.url} is no OpenAI-compatible server: GET {self._prefix}/models was answered with status "
                    f"{answer.status} and {kind}, not with a list of models"
                ) from error
        if not names:
            raise ConfigError(f"the server at {self.url} has no model")
        return names

    @contextmanager
    def stream_chat(
        self, model: str, messages: Sequence[Mapping[str, Any]], fields: Mapping[str, Any]
    ) -> Iterator[Iterator[ChatDelta]]:
        """A streamed answer; leaving the block hangs up, which ends the request.

        Args:
            model: the name that the server knows.
            messages: the conversation.
            fields: of the body, besides.

        Raises:
            EngineDeadError: nobody answers, or the connection broke.
            ConfigError: the key is wrong, or there is no such model.
            RequestError: the server refuses the request.
            RequestFailedError: the server failed, before or after the first token.
        """
        body = {"model": model, "messages": messages, **fields}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        with self._answer("POST", "/chat/completions", json.dumps(body).encode(), None) as answer:
            if answer.status != http.HTTPStatus.OK:
                raise self._refusal(answer)
            yield self._deltas(answer)

    def _deltas(self, answer: http.client.HTTPResponse) -> Iterator[ChatDelta]:
        finished = False
        while True:
            with self._talking():
                line = answer.readline()
            if not line:
                break
            data = line.removeprefix(b"data:").strip()
            if data == b"[DONE]":
                return
            if data and line.startswith(b"data:"):
                delta = self._delta(data)
                finished = finished or delta.finish_reason is not None
                yield delta
        if not finished:  # reading by lines tells no difference between an end and a broken connection
            raise EngineDeadError(f"the connection to {self.url} broke off")

    def _delta(self, data: bytes) -> ChatDelta:
        try:
            chunk = msgspec.json.decode(data, type=_Chunk)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{self.url} streams something else than OpenAI's chunks: {_shown(data)}") from error
        if chunk.error is not None:
            raise RequestFailedError(f"the server failed: {_message(chunk.error) or _shown(data)}")
        choice = chunk.choices[0] if chunk.choices else _Choice()
        delta = choice.delta or _Delta()
        return ChatDelta(
            text=delta.content or "",
            reasoning=delta.reasoning_content or delta.reasoning or "",
            finish_reason=choice.finish_reason,
            num_tokens=chunk.usage.completion_tokens if chunk.usage else None,
        )

    @contextmanager
    def _answer(
        self, method: str, path: str, body: bytes | None, silence_s: float | None
    ) -> Iterator[http.client.HTTPResponse]:
        """The head of an answer. `silence_s`: how long the server may send nothing; None: for ever."""
        connection = self._connection()
        try:
            with self._talking():
                connection.connect()
                connection.sock.settimeout(silence_s)
                connection.request(method, self._prefix + path, body, self._headers)
                answer = connection.getresponse()
            yield answer
        finally:
            connection.close()

    @contextmanager
    def _talking(self) -> Iterator[None]:
        """Around what uses the connection, and nothing else: a caller's own broken pipe is not the server's."""
        try:
            yield
        except (OSError, http.client.HTTPException) as error:
            raise EngineDeadError(f"no server answers at {self.url}: {_cause(error)}") from error

    def _connection(self) -> http.client.HTTPConnection:
        if not self._is_secure:
            return http.client.HTTPConnection(self._host, self._port, timeout=_TIMEOUT_S)
        context = ssl.create_default_context()
        return http.client.HTTPSConnection(self._host, self._port, timeout=_TIMEOUT_S, context=context)

    def _refusal(self, answer: http.client.HTTPResponse) -> Exception:
        """What an answer with another status than 200 is to us."""
        with self._talking():
            body = answer.read(_MAX_ERROR_BYTES)
        try:
            found = msgspec.json.decode(body, type=_ErrorAnswer)
            message = _message(found.error) or found.message or _shown(body)
        except (msgspec.DecodeError, UnicodeDecodeError):
            message = _shown(body)
        told = f"the server at {self.url} answers {answer.status}: {message or answer.reason}"
        if answer.status in (401, 403):
            return ConfigError(f"{told}; give its key with --api-key")
        if answer.status in (404, 405):
            return ConfigError(told)
        if answer.status in (429, 503):
            after = answer.headers.get("Retry-After", "")
            return QueueFullError(told, float(after) if after.isdecimal() else _RETRY_S)
        return RequestFailedError(told) if answer.status >= 500 else RequestError(told)


def _message(error: _Details | str | None) -> str:
    return error if isinstance(error, str) else (error.message if error else None) or ""


def _shown(body: bytes) -> str:
    text = body.decode("utf-8", "replace").strip()
    return text if len(text) <= _SHOWN else text[:_SHOWN] + " …"


def _cause(error: Exception) -> str:
    if isinstance(error, ConnectionResetError):  # http.client.RemoteDisconnected is one
        return "the connection broke off"
    if isinstance(error, http.client.HTTPException):
        return f"what answers is no HTTP server ({error!r})"
    if isinstance(error, OSError) and error.strerror and not isinstance(error, ssl.SSLError):
        return error.strerror
    return str(error) or type(error).__name__
