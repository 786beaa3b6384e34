"""Endpoints, keys, sockets: what is refused and why, and that only the key's holder gets in."""

import os
import pathlib
import stat
import tempfile
from collections.abc import Callable, Iterator

import msgspec
import pytest
import zmq

from folovllm.common.errors import ConfigError
from folovllm.common.transport import (
    HEARTBEAT_INTERVAL_MS,
    MAX_FRAME_BYTES,
    Endpoint,
    bind,
    connect,
    load_keys,
    make_runtime_dir,
    new_socket,
    runtime_dir_of,
)

BOUND_MS = 10_000
Sockets = Callable[[int], "zmq.Socket[bytes]"]


@pytest.fixture
def sockets() -> Iterator[Sockets]:
    """Makes sockets of one context and closes them at the end."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    made: list[zmq.Socket[bytes]] = []

    def make(kind: int) -> "zmq.Socket[bytes]":
        made.append(new_socket(context, kind))
        return made[-1]

    yield make
    context.destroy(0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must start with ipc:// or tcp://"),
        ("http://host:1", "must start with ipc:// or tcp://"),
        ("ipc://", "must be ipc://PATH"),
        ("ipc:///x?key=y", "without options"),
        ("ipc:///" + "x" * 107, "ipc path of 108 bytes is too long"),
        ("tcp://host", "must be tcp://HOST:PORT"),
        ("tcp://:5", "must be tcp://HOST:PORT"),
        ("tcp://host:", "must be tcp://HOST:PORT"),
        ("tcp://host:-1", "must be tcp://HOST:PORT"),
        ("tcp://host:65536", "must be tcp://HOST:PORT"),
        ("tcp://host:1?kee=x", "only ?key=FILE is known"),
    ],
)
def test_wrong_endpoints_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Endpoint.parse(text)
    assert message in str(caught.value)


def test_endpoints(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOLOVLLM_CACHE", str(tmp_path))
    assert Endpoint.parse("ipc:///run/x") == Endpoint("ipc:///run/x", None)
    assert Endpoint.parse("tcp://*:0") == Endpoint("tcp://*:0", tmp_path / "engine.key")
    assert Endpoint.parse("tcp://[::1]:80?key=/k").key_file == pathlib.Path("/k")


def test_keys_are_made_once_for_the_owner_only(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "new" / "engine.key"
    keys = load_keys(path, create=True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_keys(path, create=True) == load_keys(path, create=False) == keys
    assert len({keys.server_public, keys.server_secret, keys.client_public, keys.client_secret}) == 4
    assert list(path.parent.iterdir()) == [path]


def test_a_missing_or_broken_key_file_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match="does not exist: the engine makes it"):
        load_keys(tmp_path / "none", create=False)
    broken = tmp_path / "broken"
    broken.write_text("{}")
    with pytest.raises(ConfigError, match="broken cannot be used"):
        load_keys(broken, create=True)


@pytest.mark.parametrize("endpoint", ["ipc://{folder}/socket", "tcp://127.0.0.1:*?key={folder}/engine.key"])
def test_a_frame_there_and_back(tmp_path: pathlib.Path, sockets: Sockets, endpoint: str) -> None:
    router, dealer = sockets(zmq.ROUTER), sockets(zmq.DEALER)
    bound, authenticator = bind(router, endpoint.format(folder=tmp_path))
    try:
        assert "*" not in bound
        connect(dealer, bound)
        dealer.send(b"ping")
        assert router.poll(BOUND_MS)
        identity, frame = router.recv_multipart()
        router.send_multipart([identity, frame + b" pong"])
        assert dealer.poll(BOUND_MS)
        assert dealer.recv() == b"ping pong"
    finally:
        if authenticator is not None:
            authenticator.close()


def test_another_key_does_not_get_in(tmp_path: pathlib.Path, sockets: Sockets) -> None:
    router = sockets(zmq.ROUTER)
    bound, authenticator = bind(router, f"tcp://127.0.0.1:*?key={tmp_path}/engine.key")
    assert authenticator is not None
    address = bound.partition("?")[0]
    mine = load_keys(tmp_path / "engine.key", create=False)
    thief = msgspec.structs.replace(load_keys(tmp_path / "other.key", create=True), server_public=mine.server_public)
    (tmp_path / "thief.key").write_bytes(msgspec.json.encode(thief))
    try:
        stranger, friend = sockets(zmq.DEALER), sockets(zmq.DEALER)
        with stranger.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_AUTH) as monitor:
            connect(stranger, f"{address}?key={tmp_path}/thief.key")
            stranger.send(b"let me in")
            assert monitor.poll(BOUND_MS), "the handshake did not fail"
            stranger.disable_monitor()
        connect(friend, bound)
        friend.send(b"it is me")
        assert router.poll(BOUND_MS)
        assert router.recv_multipart()[1] == b"it is me"
        assert not router.poll(0)
    finally:
        authenticator.close()


def test_an_endpoint_in_use_is_told(tmp_path: pathlib.Path, sockets: Sockets) -> None:
    bound, authenticator = bind(sockets(zmq.ROUTER), f"tcp://127.0.0.1:*?key={tmp_path}/engine.key")
    assert authenticator is not None
    other: zmq.Context[zmq.Socket[bytes]] = zmq.Context()  # one context has one authenticator
    socket = new_socket(other, zmq.ROUTER)
    try:
        with pytest.raises(ConfigError, match=r"cannot listen on tcp://127.0.0.1:.*in use"):
            bind(socket, bound)
    finally:
        other.destroy(0)
        authenticator.close()


def test_sending_to_nobody_raises_at_a_router(tmp_path: pathlib.Path, sockets: Sockets) -> None:
    router = sockets(zmq.ROUTER)
    bind(router, f"ipc://{tmp_path}/socket")
    with pytest.raises(zmq.ZMQError) as caught:
        router.send_multipart([b"nobody", b"x"], zmq.NOBLOCK)
    assert caught.value.errno == zmq.EHOSTUNREACH


def test_heartbeats_run_on_tcp_only(tmp_path: pathlib.Path, sockets: Sockets) -> None:
    load_keys(tmp_path / "engine.key", create=True)
    local, remote = sockets(zmq.DEALER), sockets(zmq.DEALER)
    connect(local, f"ipc://{tmp_path}/socket")
    connect(remote, f"tcp://127.0.0.1:9?key={tmp_path}/engine.key")
    assert local.getsockopt(zmq.HEARTBEAT_IVL) == 0
    assert remote.getsockopt(zmq.HEARTBEAT_IVL) == HEARTBEAT_INTERVAL_MS
    assert local.getsockopt(zmq.MAXMSGSIZE) == MAX_FRAME_BYTES


def test_L37_the_runtime_folder_is_short_and_private(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    for base in (tmp_path, long):
        monkeypatch.setattr(tempfile, "tempdir", str(base))
        folders = [make_runtime_dir(os.getpid()) for _ in range(2)]
        try:
            for folder in folders:
                assert stat.S_IMODE(folder.stat().st_mode) == 0o700
                assert len(f"{folder}/frontends".encode()) <= 107
                assert runtime_dir_of(f"ipc://{folder}/launch") == folder
            assert folders[0] != folders[1]
        finally:
            for folder in folders:
                folder.rmdir()


@pytest.mark.parametrize("endpoint", ["ipc:///home/user/socket", "tcp://127.0.0.1:80"])
def test_a_folder_of_somebody_elses_is_no_runtime_folder(endpoint: str) -> None:
    assert runtime_dir_of(endpoint) is None


def test_L37_an_ipc_name_in_use_is_not_taken_away(tmp_path: pathlib.Path) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    first, second = new_socket(context, zmq.ROUTER), new_socket(context, zmq.ROUTER)
    endpoint = f"ipc://{tmp_path}/name"
    try:
        (tmp_path / "name").touch()  # what one leaves who ended without removing it
        bind(first, endpoint)
        with pytest.raises(ConfigError, match=r"cannot listen on ipc:.* address already in use"):
            bind(second, endpoint)
    finally:
        context.destroy(0)
