"""`folovllm serve`: its options, keys, and what is told before a model is loaded."""

import importlib.util
import pathlib
import socket
from typing import Any

import pytest

from folovllm.common.errors import ConfigError
from folovllm.frontend.cli.main import run
from folovllm.frontend.cli.serve import SERVER_OPTIONS
from folovllm.frontend.server import launch
from folovllm.frontend.server.launch import EngineSource
from folovllm.frontend.server.options import ServerOptions
from folovllm.frontend.server.run import listen, url_of


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[EngineSource, ServerOptions]]:
    """What the command hands over, instead of serving."""
    calls: list[tuple[EngineSource, ServerOptions]] = []

    def note(source: EngineSource, options: ServerOptions, on_ready: Any) -> None:
        calls.append((source, options))
        on_ready("http://127.0.0.1:1", "a table")

    monkeypatch.setattr(launch, "launch", note)
    monkeypatch.setattr("folovllm.frontend.cli.serve.exit_in_order", lambda *_: None)
    return calls


def test_every_option_of_the_server_has_one_of_the_command() -> None:
    elsewhere = {"served_model_names", "api_keys", "cors_origins", "access_log"}
    assert {name for _, name, _, _ in SERVER_OPTIONS} == set(ServerOptions.__struct_fields__) - elsewhere


def test_defaults_are_those_of_the_server(
    taken: list[tuple[EngineSource, ServerOptions]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["serve", "demo"]) == 0
    source, options = taken[0]
    assert options == ServerOptions(served_model_names=("demo",))
    assert source == EngineSource("demo", None, None, {"log_level": "info"})
    out = capsys.readouterr().out
    assert out.startswith("a table\n\nready; http://127.0.0.1:1/v1 ")


def test_options_arrive(
    taken: list[tuple[EngineSource, ServerOptions]], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# ours\nkey-3\n\nkey-4\n")
    monkeypatch.setenv("FOLOVLLM_API_KEYS", "key-1, key-2")
    arguments = ["--host", "0.0.0.0", "--port", "9", "--api-key-file", str(keys), "--lenient", "--no-access-log"]
    arguments += [
        "--cors-origin",
        "https://a",
        "--cors-origin",
        "https://b",
        "--drain-timeout",
        "3",
        "--root-path",
        "/x",
    ]
    arguments += ["--served-model-name", "m1", "--served-model-name", "m2", "--max-num-seqs", "7", "--keep-alive", "2"]
    assert run(["serve", str(tmp_path), *arguments]) == 0
    source, options = taken[0]
    assert options == ServerOptions(
        host="0.0.0.0",
        port=9,
        api_keys=("key-1", "key-2", "key-3", "key-4"),
        lenient=True,
        access_log=False,
        cors_origins=("https://a", "https://b"),
        drain_timeout_s=3.0,
        root_path="/x",
        served_model_names=("m1", "m2"),
        keep_alive_s=2.0,
    )
    assert source.options == {"log_level": "info", "max_num_seqs": 7}


def test_a_folder_is_served_by_its_name(
    taken: list[tuple[EngineSource, ServerOptions]], tmp_path: pathlib.Path
) -> None:
    (tmp_path / "my-model").mkdir()
    assert run(["serve", str(tmp_path / "my-model")]) == 0
    assert run(["serve", "--engine", "ipc:///x"]) == 0
    assert [options.served_model_names for _, options in taken] == [("my-model",), ()]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give either a MODEL"),
        (["demo", "--engine", "ipc:///x"], "give either a MODEL"),
        (["demo", "--api-key-file", "/nowhere/keys"], "--api-key-file /nowhere/keys cannot be read"),
        (["demo", "--port", "70000"], "port=70000"),
        (["demo", "--ssl-certfile", "x"], "give both, or none"),
    ],
)
def test_wrong_input_is_exit_code_2(
    taken: list[tuple[EngineSource, ServerOptions]],
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert run(["serve", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert taken == []


def test_a_missing_library_is_named_with_what_to_install(
    taken: list[tuple[EngineSource, ServerOptions]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvloop" else find(name))
    assert run(["serve", "demo"]) == 2
    assert "uvloop is not installed" in capsys.readouterr().err
    assert taken == []


def test_a_file_without_keys_does_not_open_the_server(
    taken: list[tuple[EngineSource, ServerOptions]], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# none yet\n")
    assert run(["serve", "demo", "--api-key-file", str(keys)]) == 2
    assert "holds no key" in capsys.readouterr().err


def test_L37_a_port_in_use_is_told_before_the_engine_is_started() -> None:
    with socket.create_server(("127.0.0.1", 0)) as used:
        options = ServerOptions(port=used.getsockname()[1])
        source = EngineSource("/no/such/model", None, None, {})
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{options.port}"):
            launch.launch(source, options, lambda *_: None)


def test_an_address_that_is_none() -> None:
    with pytest.raises(ConfigError, match=r"cannot listen on no\.such\.host\.invalid"):
        listen(ServerOptions(host="no.such.host.invalid"))


def test_several_processes_share_a_port() -> None:
    options = ServerOptions(port=0, api_server_count=2)
    with listen(options) as first:
        port = first.getsockname()[1]
        with listen(ServerOptions(port=port, api_server_count=2)) as second:
            assert second.getsockname() == first.getsockname()


@pytest.mark.parametrize(
    "options, url",
    [
        ({"host": "127.0.0.1"}, "http://127.0.0.1:{}"),
        ({"host": "0.0.0.0", "root_path": "/x"}, "http://127.0.0.1:{}/x"),
        ({"host": "127.0.0.1", "ssl_certfile": "a", "ssl_keyfile": "b"}, "https://127.0.0.1:{}"),
    ],
)
def test_the_url(options: dict[str, str], url: str) -> None:
    made = ServerOptions(port=0, **options)  # type: ignore[arg-type]
    with listen(made) as bound:
        assert url_of(made, bound) == url.format(bound.getsockname()[1])


def test_options_of_the_engine_do_not_go_with_one_that_runs() -> None:
    source = EngineSource(None, "ipc:///x", None, {"max_num_seqs": 3})
    with pytest.raises(ConfigError, match="max_num_seqs cannot be given"):
        launch.launch(source, ServerOptions(port=0, api_server_count=2), lambda *_: None)
