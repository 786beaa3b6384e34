"""A conversation → the prompt text that a model was trained on, through its Jinja2 chat template.

A template is a program out of a model folder and is not trusted: it runs in Jinja2's immutable sandbox and sees nothing
but plain JSON values. The environment is the one templates are written for (transformers'): trimmed blocks, `break` and
`continue`, `tojson` that keeps non-ASCII characters, `raise_exception`, `strftime_now`, `{% generation %}`.

Messages are checked and brought to one form first, because templates differ in what they survive:

* content given in parts is joined to one string, a line break between the parts; null content is an empty string; a
  part that is no text is refused;
* a tool call's arguments given as a JSON text are parsed, and refused with the message's place unless they are an
  object (templates differ in whether they expect text or object; a broken text would poison every later turn);
* role `developer` is `system` to a template that does not know it;
* what the template would leave out in silence is refused: an unknown role, tools, tool calls, a keyword that occurs
  nowhere in it.

`continue_final_message` puts a mark behind the last message's content and cuts the rendered prompt there, so that its
very last characters stay, blanks too. What the template writes *before* that content stays as well: Qwen3's puts an
empty `<think>` block in front of the last answer, whatever `enable_thinking` says.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from folovllm.common.errors import ModelError, RequestError
from folovllm.frontend.tokenizer import Tokenizer

Message = Mapping[str, Any]

_ROLES = frozenset({"system", "user", "assistant", "tool"})
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_PART_SEPARATOR = "\n"
_MARK = "FoloVLLM-end-of-final-message"
# What a template can do wrong with values it did not expect, besides Jinja2's own errors.
_TEMPLATE_FAULTS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


class ChatTemplate:
    """The chat templates of one model. Immutable; compiled once."""

    def __init__(
        self,
        sources: Mapping[str, str],
        *,
        special_tokens: Mapping[str, str] | None = None,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        """Args:
            sources: name → Jinja2 source. `default` is used, or `tool_use`, where there is one, for requests with
                tools.
            special_tokens: `bos_token` and so on, which templates may write.
            now: what `strftime_now` formats.

        Raises:
            ModelError: a template is not valid Jinja2.
        """
        environment = _environment(now)
        self._templates = {name: _Template(environment, name, source) for name, source in sources.items()}
        self._special_tokens = dict(special_tokens or {})

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer) -> "ChatTemplate":
        return cls(tokenizer.chat_templates, special_tokens=tokenizer.special_tokens)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **chat_template_kwargs: Any,
    ) -> str:
        """The prompt's text. Encode it with `add_special_tokens=False`: the template writes them itself.

        Args:
            messages: at least one, each with `role` and `content` (text, a list of text parts, or null).
            add_generation_prompt: end with the opening of the assistant's next message.
            continue_final_message: end within the last message, so that the model goes on with it. Needs
                `add_generation_prompt=False`.
            tools: functions the model may call, in OpenAI's form.
            chat_template_kwargs: further variables of the template, such as Qwen3's `enable_thinking`.

        Raises:
            RequestError: names the message at fault, or what the template refused.
        """
        if add_generation_prompt and continue_final_message:
            raise RequestError(
                "continue_final_message=True needs add_generation_prompt=False: the prompt ends either within the last "
                "message or with the opening of a new one",
                "continue_final_message",
            )
        template = self._choose(bool(tools))
        template.check_variables(chat_template_kwargs)
        chat = _checked_messages(messages, template)
        variables = {
            **self._special_tokens,
            "documents": None,
            "tools": _checked_tools(tools, template),
            "add_generation_prompt": add_generation_prompt,
            **{name: _plain(value, name, "chat_template_kwargs") for name, value in chat_template_kwargs.items()},
        }
        if continue_final_message:
            return _render_continued(template, chat, variables)
        return template.render(chat, variables)

    def _choose(self, with_tools: bool) -> "_Template":
        for name in ("tool_use", "default") if with_tools else ("default",):
            if name in self._templates:
                return self._templates[name]
        raise RequestError(
            "this model has no chat template (neither chat_template.jinja nor chat_template in tokenizer_config.json): "
            "it cannot chat; use generate with a prompt, or give the folder a template",
            "messages",
        )


class _Template:
    """One compiled template, and what its source tells about it."""

    def __init__(self, environment: jinja2.Environment, name: str, source: str) -> None:
        try:
            self._compiled = environment.from_string(source)
            self._variables = jinja2.meta.find_undeclared_variables(environment.parse(source))
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(f"chat template {name!r} is not valid Jinja2: {error} (line {error.lineno})") from error
        self._source = source

    def mentions(self, word: str) -> bool:
        return word in self._source

    def check_variables(self, names: Iterable[str]) -> None:
        unknown = sorted(set(names) - self._variables)
        if unknown:
            known = ", ".join(sorted(self._variables))
            raise RequestError(
                f"this model's chat template has no variable {', '.join(unknown)}; it knows {known}",
                "chat_template_kwargs",
            )

    def render(self, chat: list[dict[str, Any]], variables: Mapping[str, Any]) -> str:
        try:
            return self._compiled.render(messages=chat, **variables)
        except _TEMPLATE_FAULTS as error:
            raise RequestError(f"the chat template refuses these messages: {error}", "messages") from error


def _render_continued(template: _Template, chat: list[dict[str, Any]], variables: Mapping[str, Any]) -> str:
    last = chat[-1]
    if last.get("tool_calls"):
        raise RequestError(
            "continue_final_message: the last message has tool calls and cannot be continued", "messages"
        )
    mark = _MARK
    while mark in str(chat):
        mark += "+"
    rendered = template.render([*chat[:-1], {**last, "content": last["content"] + mark}], variables)
    prompt, found, _ = rendered.rpartition(mark)
    if not found:
        raise RequestError(
            "continue_final_message: the chat template leaves out the last message's content", "messages"
        )
    return prompt


def _checked_messages(messages: Sequence[Message], template: _Template) -> list[dict[str, Any]]:
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise RequestError(f"messages must be a list of messages, not {type(messages).__name__}", "messages")
    if not messages:
        raise RequestError("messages is empty: a conversation has at least one message", "messages")
    return [_checked_message(message, f"messages[{i}]", template) for i, message in enumerate(messages)]


def _checked_message(message: Message, where: str, template: _Template) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(f"{where} must be an object with role and content, not {type(message).__name__}", where)
    special = ("role", "content", "tool_calls")
    checked = {key: _plain(value, f"{where}.{key}", where) for key, value in message.items() if key not in special}
    checked["role"] = _checked_role(message.get("role"), where, template)
    checked["content"] = _joined_content(message.get("content"), f"{where}.content")
    if message.get("tool_calls"):
        if not template.mentions("tool_calls"):
            raise RequestError(f"{where}.tool_calls: this model's chat template knows no tool calls", where)
        checked["tool_calls"] = _checked_tool_calls(message["tool_calls"], f"{where}.tool_calls")
    if checked.get("reasoning") is not None:
        checked.setdefault("reasoning_content", checked["reasoning"])  # the name that templates read
    return {key: value for key, value in checked.items() if value is not None}


def _checked_role(role: Any, where: str, template: _Template) -> str:
    if not isinstance(role, str):
        raise RequestError(f"{where}.role must be a string, not {type(role).__name__}", where)
    if role == "developer" and not template.mentions(role):
        return "system"
    if role not in _ROLES and not (role.isidentifier() and template.mentions(role)):
        raise RequestError(f"{where}.role={role[:100]!r} is not known; use one of {', '.join(sorted(_ROLES))}", where)
    return role


def _joined_content(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise RequestError(f"{where} must be a string, a list of parts or null, not {type(content).__name__}", where)
    return _PART_SEPARATOR.join(_part_text(part, f"{where}[{i}]") for i, part in enumerate(content))


def _part_text(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise RequestError(f"{where} must be a text part, not {type(part).__name__}", where)
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in _TEXT_PARTS:
        raise RequestError(f"{where} is of type {str(kind)[:100]!r}: this model takes text only", where)
    text = part.get(_TEXT_PARTS[kind])
    if not isinstance(text, str):
        raise RequestError(f"{where}.{_TEXT_PARTS[kind]} must be a string, not {type(text).__name__}", where)
    return text


def _checked_tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list | tuple):
        raise RequestError(f"{where} must be a list, not {type(calls).__name__}", where)
    return [_checked_tool_call(call, f"{where}[{i}]") for i, call in enumerate(calls)]


def _checked_tool_call(call: Any, where: str) -> dict[str, Any]:
    if not isinstance(call, Mapping) or not isinstance(call.get("function"), Mapping):
        raise RequestError(f"{where} must be an object with a function (name, arguments)", where)
    function = call["function"]
    if not isinstance(function.get("name"), str):
        raise RequestError(f"{where}.function.name must be a string", where)
    arguments = _parsed_arguments(function.get("arguments"), f"{where}.function.arguments")
    rest = {key: _plain(value, f"{where}.{key}", where) for key, value in call.items() if key != "function"}
    return {**rest, "function": {"name": function["name"], "arguments": arguments}}


def _parsed_arguments(arguments: Any, where: str) -> Any:
    """None and an empty text, as some clients send for a function without parameters, are no arguments."""
    value = arguments
    if isinstance(arguments, str):
        try:
            value = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{where} is not valid JSON: {error}", where) from error
    if value is None and not isinstance(arguments, str):
        return {}
    if not isinstance(value, Mapping):
        raise RequestError(f"{where} must be a JSON object, not {type(value).__name__}", where)
    return _plain(value, where, where)


def _checked_tools(tools: Sequence[Mapping[str, Any]] | None, template: _Template) -> Any:
    if not tools:
        return None
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RequestError("tools must be a list of objects that describe functions", "tools")
    if not template.mentions("tools"):
        raise RequestError("this model's chat template knows no tools", "tools")
    return _plain(tools, "tools", "tools")


def _plain(value: Any, where: str, field: str, depth: int = 0) -> Any:
    """A copy of plain JSON values; templates are never handed objects with methods of their own."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if depth > 100:
        raise RequestError(f"{where} is nested too deeply", field)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}", field, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]", field, depth + 1) for i, item in enumerate(value)]
    raise RequestError(f"{where} must be a JSON value, not {type(value).__name__}", field)


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's tokens for training; here it is just its content."""

    tags = {"generation"}  # noqa: RUF012 (Jinja2's own convention)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment(now: Callable[[], datetime]) -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda layout: now().strftime(layout)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON; Jinja2's own filter would escape <, > and & for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
