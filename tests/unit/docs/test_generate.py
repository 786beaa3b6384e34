"""The reference pages: they are what the code is now, and whatever the code does not document is an error."""

import pathlib
from typing import Literal

import click
import msgspec
import pytest

from docs import generate
from folovllm.common.config import EngineConfig
from folovllm.common.messages import core_worker, frontend_core, lifecycle
from folovllm.common.sampling_params import SamplingParams
from folovllm.frontend.cli.main import cli
from folovllm.frontend.server.metrics import ENGINE_METRICS, REQUEST_METRICS
from folovllm.frontend.server.options import ServerOptions


class Sample(msgspec.Struct, array_like=True, tag="sample"):
    """One line,
    and its rest: a < b ** c ** d, `a < b`.

    Attributes:
        first: what it is,
            and more.
        second: a | b.

    Behind the section.

    Raises:
        ValueError: never.
    """

    first: int
    second: Literal["a", "b"] | None = None


class Undocumented(msgspec.Struct):
    """Says nothing of its field."""

    field: int


class Stale(msgspec.Struct):
    """Documents what is gone.

    Attributes:
        field: is there.
        gone: is not.
    """

    field: int


def test_the_pages_are_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    code = generate.main(["--check"])
    assert code == 0, capsys.readouterr().out


def test_write_then_check(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "reference"
    assert generate.main(["--check"], folder) == 1
    assert generate.main([], folder) == 0
    assert sorted(path.name for path in folder.iterdir()) == [
        "cli.md",
        "errors.md",
        "http_api.md",
        "messages.md",
        "metrics.md",
        "options.md",
        "server.md",
    ]
    capsys.readouterr()
    assert generate.main(["--check"], folder) == 0
    assert capsys.readouterr().out == "the reference pages are up to date\n"


@pytest.mark.parametrize("name", sorted(generate.pages()))
def test_a_change_in_any_page_is_found(name: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate.main([], tmp_path)
    page = tmp_path / name
    page.write_text(page.read_text(encoding="utf-8") + "typed by hand\n", encoding="utf-8")
    before = page.read_text(encoding="utf-8")
    assert generate.main(["--check"], tmp_path) == 1
    shown = capsys.readouterr().out
    assert f"--- {name}" in shown and "-typed by hand" in shown and "python -m docs.generate" in shown
    assert page.read_text(encoding="utf-8") == before, "a check writes nothing"


def test_a_missing_and_a_stray_page_are_found(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate.main([], tmp_path)
    (tmp_path / "cli.md").rename(tmp_path / "other.md")
    assert generate.main(["--check"], tmp_path) == 1
    shown = capsys.readouterr().out
    assert "other.md is not one of the generated pages" in shown and "+# Command line" in shown


def test_docstrings_are_taken_apart() -> None:
    doc = generate.parse_docstring(Sample.__doc__ or "")
    assert doc.paragraphs == ["One line, and its rest: a < b ** c ** d, `a < b`.", "Behind the section."]
    assert doc.attributes == {"first": "what it is, and more.", "second": "a | b."}
    assert doc.raises == {"ValueError": "never."}


def test_a_line_of_no_entry_is_refused() -> None:
    with pytest.raises(ValueError, match="belongs to no entry"):
        generate.parse_docstring("Text.\n\nAttributes:\n        no name before it")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (int, "int"),
        (int | None, "int | None"),
        (list[str] | str, "list[str] | str"),
        (dict[int, float], "dict[int, float]"),
        (lifecycle.Role, '"core" | "worker" | "frontend"'),
        (list[core_worker.NewRequest], "list[NewRequest]"),
    ],
)
def test_type_names(kind: object, name: str) -> None:
    assert generate.type_name(kind) == name


def test_rows_of_fields() -> None:
    assert generate.field_rows(Sample) == [
        ["`first`", "`int`", "", "what it is, and more."],
        ["`second`", '`"a" | "b" | None`', "`None`", "a | b."],
    ]


def test_undocumented_and_stale_fields_are_errors() -> None:
    with pytest.raises(ValueError, match=r"Undocumented\.field is not documented"):
        generate.field_rows(Undocumented)
    assert generate.field_rows(Undocumented, "see above") == [["`field`", "`int`", "", "see above"]]
    with pytest.raises(ValueError, match="documents gone, which it does not have"):
        generate.field_rows(Stale)


def test_every_struct_of_the_messages_is_on_the_page_once() -> None:
    page = generate.messages_page()
    modules = (lifecycle, frontend_core, core_worker)
    structs = {
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, msgspec.Struct) and value is not EngineConfig
    }
    assert len(structs) > 20
    for struct in structs:
        assert page.count(f"\n### {struct.__name__}\n") == 1
        assert all(f"\n| `{field.name}` |" in page for field in msgspec.structs.fields(struct))


def test_every_option_is_on_its_page() -> None:
    page = generate.options_page()
    for struct in (EngineConfig, SamplingParams):
        assert all(f"\n| `{field.name}` |" in page for field in msgspec.structs.fields(struct))
    assert [row[0] for row in generate.environment_rows()] == [
        "`FOLOVLLM_CACHE`",
        "`FOLOVLLM_API_KEYS`",
        "`FOLOVLLM_CPU_KERNELS`",
        "`FOLOVLLM_LOG_LEVEL`",
    ]


def test_every_metric_and_option_of_the_server_is_on_its_page() -> None:
    page = generate.metrics_page()
    assert all(f"`folovllm:{spec.name}" in page for spec in (*REQUEST_METRICS, *ENGINE_METRICS))
    assert "| `folovllm:request_success_total` | counter | `finished_reason` |" in page
    assert all(f"\n| `{name}` |" in generate.server_page() for name in ServerOptions.__struct_fields__)


@pytest.mark.parametrize("name", [name for name, _ in generate.commands(cli)])
def test_every_option_of_a_command_is_on_the_page(name: str) -> None:
    page = generate.cli_page()
    section = page[page.index(f"\n## folovllm {name}\n") :].split("\n## ")[1]
    for parameter in dict(generate.commands(cli))[name].params:
        if isinstance(parameter, click.Option):
            assert all(f"`{name}`" in section for name in parameter.opts)


@pytest.mark.parametrize(
    ("option", "row"),
    [
        (
            click.Option(["--size", "-s"], type=int, help="How many [16]."),
            ["`--size`, `-s`", "integer", "16", "How many."],
        ),
        (click.Option(["--on"], is_flag=True, help="Turns it on."), ["`--on`", "", "", "Turns it on."]),
        (click.Option(["--to"], required=True, metavar="X", help="Where."), ["`--to`", "X", "required", "Where."]),
        (click.Option(["--in"], type=click.Choice(["a", "b"]), help="Of [a]."), ["`--in`", "`a`, `b`", "a", "Of."]),
        (click.Option(["--of"], type=click.IntRange(1, 2), help="Depth."), ["`--of`", "1 to 2", "", "Depth."]),
        (click.Option(["--up"], type=click.IntRange(min=3), help="Size."), ["`--up`", "at least 3", "", "Size."]),
    ],
)
def test_rows_of_command_line_options(option: click.Option, row: list[str]) -> None:
    assert generate.option_row(option) == row


def test_an_option_without_help_is_an_error() -> None:
    with pytest.raises(ValueError, match="option size has no help"):
        generate.option_row(click.Option(["--size"]))
