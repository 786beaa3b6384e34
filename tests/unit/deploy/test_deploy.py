"""What deploy/ says fits the code: options, ports, paths, names of files and variables. No container is started."""

import configparser
import json
import pathlib
import re
import shlex
import tomllib
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from folovllm.common import config
from folovllm.frontend.cli.main import run
from folovllm.frontend.cli.serve import serve
from folovllm.frontend.server.gate import OPEN_PATHS
from folovllm.frontend.server.options import ServerOptions
from folovllm.frontend.server.run import _ENDING_S
from tests.sources import ROOT

DEPLOY = ROOT / "deploy"
DOCKERFILES = (DEPLOY / "Dockerfile.cpu", DEPLOY / "Dockerfile.cuda")
CONFIG_SOURCE = pathlib.Path(config.__file__).read_text(encoding="utf-8")
# Variables of the libraries that an image brings, and of systemd's own file.
_OTHERS = {"PATH", "HOME", "HF_HOME", "TRITON_CACHE_DIR", "PYTHONUNBUFFERED", "MODEL", "OPTIONS"}
_NVIDIAS = {"NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES"}


def options_of(arguments: list[str]) -> dict[str, Any]:
    """What `folovllm serve` is told by a command line; it fails where there is no such option."""
    return dict(serve.make_context("serve", list(arguments)).params)


def instructions(path: pathlib.Path) -> list[tuple[str, str]]:
    """(instruction, the rest) of a Dockerfile."""
    text = "".join(line for line in path.read_text(encoding="utf-8").splitlines(True) if not line.startswith("#"))
    lines = text.replace("\\\n", " ").splitlines()
    return [(line.split()[0], " ".join(line.split()[1:])) for line in lines if line.strip()]


def compose() -> dict[str, Any]:
    text = (DEPLOY / "docker-compose.yml").read_text(encoding="utf-8")
    loaded: dict[str, Any] = yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text))
    return loaded


def check_variables(names: set[str]) -> None:
    """Those of the engine are read by its configuration."""
    unknown = {name for name in names - _OTHERS - _NVIDIAS if f'"{name}"' not in CONFIG_SOURCE}
    assert unknown == set()


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
class TestDockerfile:
    def test_it_serves_what_its_ports_and_its_health_check_ask_for(self, path: pathlib.Path) -> None:
        found = instructions(path)
        (entry,) = [json.loads(rest) for name, rest in found if name == "ENTRYPOINT"]
        (command,) = [json.loads(rest) for name, rest in found if name == "CMD"]
        assert entry == ["folovllm", "serve"]
        told = options_of(command)
        assert (told["model"], told["host"], told["port"]) == ("demo", "0.0.0.0", None)
        port = ServerOptions().port
        assert [rest for name, rest in found if name == "EXPOSE"] == [str(port)]
        (check,) = [rest for name, rest in found if name == "HEALTHCHECK"]
        urls = re.findall(r"http://127\.0\.0\.1:(\d+)(/\w+)", check)
        assert urls == [(str(port), "/health")]
        assert "/health" in OPEN_PATHS, "the check has no key"

    def test_its_health_check_lets_a_worker_be_replaced(self, path: pathlib.Path) -> None:
        (check,) = [rest for name, rest in instructions(path) if name == "HEALTHCHECK"]
        told = dict(re.findall(r"--([\w-]+)=(\d+)", check))
        assert int(told["retries"]) * int(told["interval"]) >= 600

    def test_it_runs_as_a_user_without_rights_who_owns_the_models(self, path: pathlib.Path) -> None:
        found = instructions(path)
        users = [rest for name, rest in found if name == "USER"]
        assert users == ["folovllm"]
        assert found.index(("USER", "folovllm")) > max(i for i, (name, _) in enumerate(found) if name == "RUN")
        (made,) = [rest for name, rest in found if name == "RUN" and "useradd" in rest]
        assert "--uid 10001 --create-home folovllm" in made
        assert "chown folovllm /models" in made
        (environment,) = [rest for name, rest in found if name == "ENV"]
        values = dict(pair.split("=", 1) for pair in shlex.split(environment))
        check_variables(set(values))
        assert values["FOLOVLLM_CACHE"].startswith("/models/")

    def test_it_installs_pinned_versions_of_extras_that_exist(self, path: pathlib.Path) -> None:
        (install,) = [rest for name, rest in instructions(path) if "pip install" in rest]
        assert "-c constraints.txt" in install
        assert ("download.pytorch.org/whl/cpu" in install) == (path.suffix == ".cpu")
        (extras,) = re.findall(r"\.\[([\w,]+)\]", install)
        known = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
        assert set(extras.split(",")) <= set(known)
        assert ("gpu" in extras) == (path.suffix == ".cuda")
        assert [rest for name, rest in instructions(path) if name == "FROM"] == [
            "python:3.11-slim AS build",
            "python:3.11-slim",
        ]


def test_images_are_built_of_what_a_wheel_needs() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    named = {line[1:] for line in lines if line.startswith("!")}
    assert lines[1] == "*"
    assert all((ROOT / name).exists() for name in named)
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    targets = pyproject["tool"]["hatch"]["build"]["targets"]
    needed = {path.partition("/")[0] for path in targets["wheel"]["only-include"]}
    assert needed | {"pyproject.toml", "constraints.txt", "README.md", "LICENSE"} == named


def test_compose_starts_the_server_and_shows_its_dashboard() -> None:
    services = compose()["services"]
    server = services["folovllm"]
    told = options_of(server["command"])
    assert (told["model"], told["host"]) == ("demo", "0.0.0.0")
    check_variables(set(server["environment"]))
    assert (DEPLOY / server["build"]["context"] / server["build"]["dockerfile"]).is_file()
    assert server["ports"] == [f"127.0.0.1:{told['port']}:{told['port']}"]
    assert int(server["stop_grace_period"].removesuffix("s")) > told["drain_timeout_s"] + _ENDING_S
    assert all(str(port).startswith("127.0.0.1:") for service in services.values() for port in service["ports"])
    prometheus = yaml.safe_load((DEPLOY / "prometheus.yml").read_text(encoding="utf-8"))
    (job,) = prometheus["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"folovllm:{told['port']}"]}]
    assert "metrics_path" not in job, "the server has its metrics where Prometheus looks by itself: /metrics"


def test_compose_mounts_what_exists() -> None:
    loaded = compose()
    for service in loaded["services"].values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert (DEPLOY / source).exists() if source.startswith(".") else source in loaded["volumes"], volume


def test_grafana_finds_prometheus_and_the_dashboard() -> None:
    services = compose()["services"]
    provisioning = DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text("utf-8"))["datasources"]
    port = services["prometheus"]["ports"][0].rsplit(":", 1)[1]
    assert source["url"] == f"http://prometheus:{port}"
    dashboard = json.loads((DEPLOY / "grafana" / "folovllm.json").read_text(encoding="utf-8"))
    asked = next(variable for variable in dashboard["templating"]["list"] if variable["name"] == "datasource")
    assert (asked["type"], asked["query"]) == ("datasource", source["type"])
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "folovllm.yml").read_text("utf-8"))["providers"]
    mounts = dict(volume.split(":")[:2] for volume in services["grafana"]["volumes"])
    shown = mounts["./grafana/folovllm.json"]
    assert pathlib.PurePosixPath(shown).parent.as_posix() == provider["options"]["path"]
    assert services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == shown
    assert mounts["./grafana/provisioning"] == "/etc/grafana/provisioning"


def test_nobody_logs_in_to_grafana_with_its_first_password() -> None:
    told = compose()["services"]["grafana"]["environment"]
    assert (told["GF_AUTH_ANONYMOUS_ENABLED"], told["GF_AUTH_ANONYMOUS_ORG_ROLE"]) == ("true", "Viewer")
    assert (told["GF_AUTH_DISABLE_LOGIN_FORM"], told["GF_AUTH_BASIC_ENABLED"]) == ("true", "false")


def test_compose_restarts_what_has_ended_and_has_no_other_health_check_than_the_image() -> None:
    server = compose()["services"]["folovllm"]
    assert server["restart"] == "unless-stopped"
    assert "healthcheck" not in server


def unit() -> configparser.SectionProxy:
    parser = configparser.ConfigParser(strict=False, interpolation=None, comment_prefixes=("#",), delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(DEPLOY / "folovllm.service", encoding="utf-8")
    return parser["Service"]


def environment_file() -> dict[str, str]:
    lines = (DEPLOY / "folovllm.env").read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def test_the_unit_starts_the_server_and_lets_it_drain() -> None:
    service, values = unit(), environment_file()
    assert service["EnvironmentFile"] == "/etc/folovllm/folovllm.env"
    program, *arguments = shlex.split(service["ExecStart"])
    assert program.startswith("/opt/folovllm/bin/")
    assert arguments == ["serve", "$MODEL", "$OPTIONS"]
    told = options_of([values["MODEL"], *values["OPTIONS"].split()])
    assert (told["host"], told["port"]) == ("127.0.0.1", ServerOptions().port)
    check_variables(set(values))
    assert int(service["TimeoutStopSec"]) > told["drain_timeout_s"] + _ENDING_S
    assert (service["KillMode"], service["KillSignal"]) == ("mixed", "SIGTERM")


def test_the_unit_does_not_try_wrong_input_again() -> None:
    wrong = run(["serve", "demo", "--port", "none"])
    service = unit()
    assert (service["Restart"], service["RestartPreventExitStatus"]) == ("on-failure", str(wrong))


def test_the_unit_writes_where_it_may_and_has_no_rights() -> None:
    service = unit()
    text = (DEPLOY / "folovllm.service").read_text(encoding="utf-8")
    folder = f"/var/cache/{service['CacheDirectory']}"
    pairs = [pair for line in re.findall(r"^Environment=(.*)$", text, re.MULTILINE) for pair in line.split()]
    names = dict(pair.split("=", 1) for pair in pairs)
    assert all(value.startswith(folder) for value in names.values())
    check_variables(set(names))
    for name in ("NoNewPrivileges", "ProtectHome", "PrivateTmp", "PrivateDevices", "DynamicUser", "RestrictNamespaces"):
        assert service[name] == "yes", name
    assert service["ProtectSystem"] == "strict"
    assert service["CapabilityBoundingSet"] == ""
    assert "\nMemoryDenyWriteExecute=" not in text, "kernels are compiled at run time"
