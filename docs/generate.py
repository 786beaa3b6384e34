"""Makes the reference pages out of the code, so that they cannot say anything else than it does.

    python -m docs.generate            # writes docs/reference/*.md
    python -m docs.generate --check    # writes nothing; shows what has drifted and exits with 1

Sources: the Structs of `common/messages/`, `EngineConfig` and `SamplingParams` with the `Attributes` sections of their
docstrings, the click commands, `common/errors.py`. What a docstring lacks is an error here, not a gap on the page.
"""

import argparse
import ast
import difflib
import inspect
import json
import pathlib
import re
import sys
import types
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

import click
import msgspec

from folovllm.common import config, errors
from folovllm.common.messages import core_worker, frontend_core, lifecycle
from folovllm.common.sampling_params import SamplingParams
from folovllm.common.structured_outputs import StructuredOutputsParams
from folovllm.frontend.cli import main as cli_main
from folovllm.frontend.cli.options import GroupedCommand, GroupedOption
from folovllm.frontend.server import metrics
from folovllm.frontend.server.options import ServerOptions

FOLDER = pathlib.Path(__file__).resolve().parent / "reference"

_MODULES = (lifecycle, frontend_core, core_worker)
_DIRECTIONS: tuple[tuple[str, Any], ...] = (
    ("Parent → core", lifecycle.ParentToCore),
    ("Core → parent", lifecycle.CoreToParent),
    ("Frontend → core", frontend_core.FrontendToCore),
    ("Core → frontend", frontend_core.CoreToFrontend),
    ("Core → worker", core_worker.CoreToWorker),
    ("Worker → core", core_worker.WorkerToCore),
)
_SECTION = re.compile(r"^(Attributes|Args|Raises):$")
_ENTRY = re.compile(r"^    (\w+): (.*)$")
_DEFAULT = re.compile(r"^(.*?) \[([^\[\]]+)\]\.$")
_CODE = re.compile(r"(`[^`]*`)")

StructClass = type[msgspec.Struct]


class Docstring(NamedTuple):
    """A docstring taken apart: paragraphs in order, and the entries of its Attributes and Raises sections."""

    paragraphs: list[str]
    attributes: dict[str, str]
    raises: dict[str, str]


def parse_docstring(text: str) -> Docstring:
    """Lines of a paragraph or of an entry are joined; what stands behind a section is a paragraph again."""
    paragraphs: list[str] = []
    sections: dict[str, dict[str, str]] = {}
    for block in inspect.cleandoc(text).split("\n\n"):
        lines = block.splitlines()
        if heading := _SECTION.match(lines[0]):
            sections[heading[1]] = _entries(lines[1:])
        else:
            paragraphs.append(" ".join(line.strip() for line in lines))
    return Docstring(paragraphs, sections.get("Attributes", {}), sections.get("Raises", {}))


def _entries(lines: Sequence[str]) -> dict[str, str]:
    entries: dict[str, str] = {}
    name = ""
    for line in lines:
        if entry := _ENTRY.match(line):
            name = entry[1]
            entries[name] = entry[2]
        elif not name:
            raise ValueError(f"{line!r} belongs to no entry")
        else:
            entries[name] += " " + line.strip()
    return entries


def type_name(kind: Any) -> str:
    """A type as one writes it in code, with what aliases stand for."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " | ".join(json.dumps(value) for value in args)
    if origin in (Union, types.UnionType):
        return " | ".join(type_name(arg) for arg in args)
    if origin is not None:
        return f"{type_name(origin)}[{', '.join(type_name(arg) for arg in args)}]"
    if kind is Ellipsis:
        return "..."
    return "None" if kind is types.NoneType else str(kind.__name__)


def structs_in(kind: Any) -> list[StructClass]:
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return [kind]
    return [struct for arg in get_args(kind) for struct in structs_in(arg)]


def prose(text: str) -> str:
    """Prose for Markdown: outside of code spans nothing is taken for HTML or bold."""
    parts = _CODE.split(text)
    return "".join(part if part.startswith("`") else part.replace("<", "&lt;").replace("**", r"\*\*") for part in parts)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page(title: str, source: str, *parts: str) -> str:
    made = f"*Made from {source} by `python -m docs.generate`; change it there.*"
    return "\n\n".join([f"# {title}", made, *parts]) + "\n"


def _doc(thing: Any) -> Docstring:
    if not thing.__doc__:
        raise ValueError(f"{thing.__name__} has no docstring")
    return parse_docstring(thing.__doc__)


# Messages


def messages_page() -> str:
    uses = Counter(message for _, union in _DIRECTIONS for message in get_args(union))
    _check_all_described(set(uses))
    shared = [message for message, count in uses.items() if count > 1]
    overview = [
        [direction, ", ".join(_link(message) for message in get_args(union))] for direction, union in _DIRECTIONS
    ]
    described: set[StructClass] = set()
    sections = ["## On several links", *_described(shared, described)]
    for direction, union in _DIRECTIONS:
        sections += [f"## {direction}", *_described(get_args(union), described)]
    intro = (
        "MessagePack over ZeroMQ, one frame a message: an array of its tag and its fields in the order shown. "
        "Where the message says so, fields at the end that have their default may be left out. Structs without a tag "
        "are parts of others."
    )
    heads = [f"**`{module.__name__}`** {prose(' '.join(_doc(module).paragraphs))}" for module in _MODULES]
    return page("Messages", "`common/messages/`", intro, table(["direction", "messages"], overview), *heads, *sections)


def _check_all_described(sent: set[StructClass]) -> None:
    """Every tagged Struct of the modules travels in some direction."""
    for module in _MODULES:
        for name, value in vars(module).items():
            own = isinstance(value, type) and issubclass(value, msgspec.Struct) and value.__module__ == module.__name__
            if own and value.__struct_config__.tag is not None and value not in sent:
                raise ValueError(f"{module.__name__}.{name} is a message of no direction")


def _described(structs: Sequence[StructClass], described: set[StructClass]) -> Iterator[str]:
    """Each Struct that was not described before, and behind it the parts it is made of."""
    for struct in structs:
        if struct not in described and struct is not config.EngineConfig:
            described.add(struct)
            yield from _described_one(struct)
            parts = [part for field in msgspec.structs.fields(struct) for part in structs_in(field.type)]
            yield from _described(parts, described)


def _described_one(struct: StructClass) -> Iterator[str]:
    doc, tag = _doc(struct), struct.__struct_config__.tag
    yield f"### {struct.__name__}"
    facts = f"tag `{tag}`" if tag else "part of a message"
    if struct.__struct_config__.omit_defaults:
        facts += ", defaults may be left out"
    yield f"*{facts}.* " + "\n\n".join(prose(paragraph) for paragraph in doc.paragraphs)
    if rows := field_rows(struct):
        yield table(["field", "type", "default", "meaning"], rows)


def _link(struct: StructClass) -> str:
    page = "options.md" if struct is config.EngineConfig else ""
    return f"[{struct.__name__}]({page}#{struct.__name__.lower()})"


def field_rows(struct: StructClass, undocumented: str = "") -> list[list[str]]:
    """Name, type, default and meaning of each field.

    Args:
        struct: whose fields.
        undocumented: the meaning of fields that the docstring leaves out; "" allows none.

    Raises:
        ValueError: a field is not documented, or what is documented is no field.
    """
    fields, meanings = msgspec.structs.fields(struct), _doc(struct).attributes
    if strange := set(meanings) - {field.name for field in fields}:
        raise ValueError(f"{struct.__name__} documents {', '.join(sorted(strange))}, which it does not have")
    rows = []
    for field in fields:
        meaning = meanings.get(field.name, undocumented)
        if not meaning:
            raise ValueError(f"{struct.__name__}.{field.name} is not documented")
        rows.append([f"`{field.name}`", _type_cell(field.type), _default_cell(field), prose(meaning)])
    return rows


def _type_cell(kind: Any) -> str:
    structs = structs_in(kind)
    if not structs:
        return f"`{type_name(kind)}`"
    return ("list of " if get_origin(kind) is list else "") + ", ".join(_link(struct) for struct in structs)


def _default_cell(field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return ""
    default = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
    return f"`{default!r}`"


# Options


def options_page() -> str:
    parts = ["## EngineConfig", *_options_of(config.EngineConfig)]
    parts.append("`LLM`, `AsyncLLM` and the [command line](cli.md) take them as they are named here, but for `model`.")
    parts += ["## SamplingParams", *_options_of(SamplingParams)]
    parts += ["## StructuredOutputsParams", *_options_of(StructuredOutputsParams)]
    parts += ["## Environment variables", table(["variable", "what reads it"], environment_rows())]
    sources = "`common/config.py`, `common/sampling_params.py` and `common/structured_outputs.py`"
    return page("Options", sources, *parts)


def _options_of(struct: StructClass) -> Iterator[str]:
    doc = _doc(struct)
    yield "\n\n".join(prose(paragraph) for paragraph in doc.paragraphs)
    yield table(["option", "type", "default", "meaning"], field_rows(struct))
    if doc.raises:
        yield "\n".join(f"* raises `{name}`: {prose(text)}" for name, text in doc.raises.items())


def environment_rows() -> list[list[str]]:
    """The variables that `common/config.py` names, with the docstrings of the functions that read them."""
    rows: dict[str, str] = {}
    for function in ast.parse(inspect.getsource(config)).body:
        for node in ast.walk(function) if isinstance(function, ast.FunctionDef) else ():
            if isinstance(node, ast.Constant) and re.fullmatch(r"FOLOVLLM_\w+", str(node.value)):
                assert isinstance(function, ast.FunctionDef), "the loop goes over functions only"
                doc = parse_docstring(ast.get_docstring(function) or "")
                rows[f"`{node.value!s}`"] = prose(" ".join(doc.paragraphs))
    return [list(row) for row in rows.items()]


# Command line


def cli_page() -> str:
    named = list(commands(cli_main.cli))
    overview = table(
        ["command", "what it does"],
        [[_command_link(name), prose(command.get_short_help_str(200))] for name, command in named],
    )
    codes = [text for text in _doc(cli_main).paragraphs if text.startswith("Exit codes")]
    parts = [part for name, command in named for part in _command(name, command)]
    return page("Command line", "`frontend/cli/`", _help(cli_main.cli), overview, *codes, *parts)


def commands(group: click.Group, prefix: str = "") -> Iterator[tuple[str, click.Command]]:
    """The commands below a group with their whole names, such as "trace show"."""
    for name in sorted(group.commands):
        command = group.commands[name]
        if isinstance(command, click.Group):
            yield from commands(command, f"{prefix}{name} ")
        else:
            yield prefix + name, command


def _command_link(name: str) -> str:
    return f"[`folovllm {name}`](#folovllm-{name.replace(' ', '-')})"


def _help(command: click.Command) -> str:
    if not command.help:
        raise ValueError(f"command {command.name} has no help")
    return "\n\n".join(prose(paragraph) for paragraph in parse_docstring(command.help).paragraphs)


def _command(name: str, command: click.Command) -> Iterator[str]:
    context = click.Context(command, info_name=f"folovllm {name}")
    yield f"## folovllm {name}"
    yield f"```sh\nfolovllm {name} {' '.join(command.collect_usage_pieces(context))}\n```"
    yield _help(command)
    groups: dict[str, list[list[str]]] = {}
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            group = parameter.group if isinstance(parameter, GroupedOption) else "Other options"
            groups.setdefault(group, []).append(option_row(parameter))
    for group, rows in groups.items():
        yield f"**{group}**"
        yield table(["option", "value", "default", "meaning"], rows)
    if isinstance(command, GroupedCommand) and command.examples:
        yield "```sh\n" + "\n".join(command.examples) + "\n```"


def option_row(option: click.Option) -> list[str]:
    """Names, kind of value, default and help of one option; help texts end on their default in brackets."""
    if not option.help:
        raise ValueError(f"option {option.name} has no help")
    found = _DEFAULT.match(option.help)
    meaning, default = (f"{found[1]}.", found[2]) if found else (option.help, "")
    names = ", ".join(f"`{name}`" for name in option.opts)
    return [names, _value(option), "required" if option.required else prose(default), prose(meaning)]


def _value(option: click.Option) -> str:
    if option.is_flag:
        return ""
    if isinstance(option.type, click.Choice):
        return ", ".join(f"`{name}`" for name in map(str, option.type.choices))
    if isinstance(option.type, click.IntRange):
        low, high = option.type.min, option.type.max
        return f"at least {low}" if high is None else f"{low} to {high}"
    return option.metavar or option.type.name


# Errors


def errors_page() -> str:
    tree = inspect.cleandoc(errors.__doc__ or "").split("\n\n", 1)[1]
    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    parts = [f"`{error.__name__}`: {prose(' '.join(_doc(error).paragraphs))}" for error in classes]
    return page("Errors", "`common/errors.py`", f"```\n{tree}\n```", "\n".join(f"* {part}" for part in parts))


# The server


def metrics_page() -> str:
    parts: list[str] = []
    for title, specs in (("Of requests", metrics.REQUEST_METRICS), ("Of the engine", metrics.ENGINE_METRICS)):
        parts += [f"## {title}", table(["name", "kind", "labels", "meaning"], [_metric_row(spec) for spec in specs])]
    intro = (
        "What `GET /metrics` of `folovllm serve` shows. Every metric has the label `model_name`. Metrics of requests "
        "are those that this server answered, all its processes together; those of the engine are asked from it at "
        "each scrape, and left out where it does not answer in time."
    )
    return page("Metrics", "`frontend/server/metrics.py`", intro, *parts)


def _metric_row(spec: metrics.MetricSpec) -> list[str]:
    name = metrics.PREFIX + spec.name + ("_total" if spec.kind == "counter" else "")
    return [f"`{name}`", spec.kind, ", ".join(f"`{label}`" for label in spec.labels), prose(spec.help)]


def server_page() -> str:
    intro = "What `folovllm serve` can be told. The [command line](cli.md#folovllm-serve) has an option for each."
    api = "Paths, bodies and answers are on the page [HTTP API](http_api.md)."
    return page("Server", "`frontend/server/options.py`", intro, *_options_of(ServerOptions), api)


# The program


def pages() -> dict[str, str]:
    """Name → text of every page."""
    from docs.http_api import http_api_page  # which is made with the functions above

    return {
        "cli.md": cli_page(),
        "errors.md": errors_page(),
        "http_api.md": http_api_page(),
        "messages.md": messages_page(),
        "metrics.md": metrics_page(),
        "options.md": options_page(),
        "server.md": server_page(),
    }


def drift(folder: pathlib.Path) -> list[str]:
    """What differs between the pages in `folder` and the code, as lines for people."""
    wanted = pages()
    there = {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.md"))}
    lines = [f"{name} is not one of the generated pages" for name in there if name not in wanted]
    for name, text in wanted.items():
        old = there.get(name, "").splitlines()
        lines += difflib.unified_diff(
            old, text.splitlines(), f"{name} as it is", f"{name} as the code is", lineterm="", n=0
        )
    return lines


def main(arguments: Sequence[str] | None = None, folder: pathlib.Path = FOLDER) -> int:
    """Writes the pages, or compares them; returns the exit code."""
    parser = argparse.ArgumentParser(description="Makes the reference pages out of the code.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a page has drifted")
    if parser.parse_args(arguments).check:
        lines = drift(folder)
        print("\n".join([*lines, "run: python -m docs.generate"] if lines else ["the reference pages are up to date"]))
        return 1 if lines else 0
    folder.mkdir(exist_ok=True)
    for name, text in pages().items():
        (folder / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
