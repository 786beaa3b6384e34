"""Sockets between processes: endpoints, CURVE keys, typed codecs. It does not know what messages mean.

An endpoint is `ipc://PATH` or `tcp://HOST:PORT`, the latter always encrypted and authenticated with CURVE. A tcp
endpoint may name its key file, `tcp://HOST:PORT?key=FILE`; without it `<cache>/engine.key` is used, which the binding
side makes on first use (mode 0600). The file holds the server's key pair and the one client key pair that is let in; a
client on another machine needs a copy of it.

Heartbeats run on tcp only. Over ipc the kernel reports a peer's end at once, and a peer that is merely stopped
(SIGSTOP, a debugger) must not lose its connection, and the frames on it, for being silent.
"""

import contextlib
import os
import pathlib
import socket as stdlib_socket
import tempfile
import urllib.parse
from typing import Any, Final, Generic, NamedTuple, TypeVar

import msgspec
import zmq

from folovllm.common.config import cache_dir
from folovllm.common.errors import ConfigError, ProtocolError

T = TypeVar("T")

MAX_IPC_PATH_BYTES: Final = 100  # sun_path holds 108 with its final zero; room is left for socket names of ours
MAX_FRAME_BYTES: Final = 256 * 2**20  # bounds what a peer can make us hold at once; `core_client` keeps well below
_RUNTIME_DIR_PREFIX: Final = "folovllm-"
HEARTBEAT_INTERVAL_MS: Final = 1000
HEARTBEAT_TIMEOUT_MS: Final = 10_000  # a hiccup of the network passes, a peer that is gone frees its blocks soon


class Endpoint(NamedTuple):
    """A parsed endpoint: what ZeroMQ binds or dials, and the CURVE key file for tcp (None for ipc)."""

    address: str
    key_file: pathlib.Path | None

    @classmethod
    def parse(cls, text: str) -> "Endpoint":
        """Raises ConfigError, naming what is wrong and what would be right."""
        address, _, query = text.partition("?")
        if address.startswith("ipc://"):
            return cls(_checked_ipc(address, query), None)
        if not address.startswith("tcp://"):
            raise ConfigError(f"endpoint {text!r} must start with ipc:// or tcp://")
        host, separator, port = address.removeprefix("tcp://").rpartition(":")
        if not separator or not host or not (port == "*" or (port.isdecimal() and int(port) < 65536)):
            raise ConfigError(f"endpoint {text!r} must be tcp://HOST:PORT, with PORT 0 or * to let the system choose")
        options = urllib.parse.parse_qs(query, keep_blank_values=True)
        if set(options) - {"key"}:
            raise ConfigError(f"endpoint {text!r} has unknown options; only ?key=FILE is known")
        key = options.get("key", [""])[0]
        return cls(address, pathlib.Path(key).expanduser() if key else cache_dir() / "engine.key")


def _checked_ipc(address: str, query: str) -> str:
    path = address.removeprefix("ipc://")
    if query or not path:
        raise ConfigError(f"endpoint {address!r} must be ipc://PATH without options")
    if len(path.encode()) > 107:
        raise ConfigError(
            f"ipc path of {len(path.encode())} bytes is too long: the system allows 107; use a shorter folder"
        )
    return address


class CurveKeys(msgspec.Struct, frozen=True):
    """Contents of a key file: Z85 text keys of the server and of the one client that is let in."""

    server_public: str
    server_secret: str
    client_public: str
    client_secret: str


def load_keys(path: pathlib.Path, *, create: bool) -> CurveKeys:
    """Reads a key file; makes one first (mode 0600) if `create` and it is absent. Raises ConfigError."""
    try:
        if create and not path.exists():
            _make_keys(path)
        return msgspec.json.decode(path.read_bytes(), type=CurveKeys)
    except FileNotFoundError:
        message = (
            f"key file {path} does not exist: the engine makes it when it starts; "
            "copy it from the engine's machine, or name it with ?key=FILE"
        )
        raise ConfigError(message) from None
    except (msgspec.DecodeError, OSError) as error:
        raise ConfigError(f"key file {path} cannot be used: {error}") from error


def _make_keys(path: pathlib.Path) -> None:
    """Writes a new key file as a whole, so that nobody reads half of it; of two that do so at once, the first wins."""
    server, client = zmq.curve_keypair(), zmq.curve_keypair()
    keys = CurveKeys(*(key.decode() for key in (*server, *client)))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent) as file:  # made with mode 0600
        file.write(msgspec.json.encode(keys))
        file.flush()
        with contextlib.suppress(FileExistsError):
            os.link(file.name, path)


class _OneClient:
    """The callback that pyzmq's authenticator asks whether a client's public key may come in."""

    def __init__(self, client_public: str) -> None:
        self._client_public = client_public.encode()

    def callback(self, domain: str, key: bytes) -> bool:  # noqa: ARG002 - pyzmq's signature
        return key == self._client_public  # Z85, as pyzmq passes it


class Authenticator:
    """Lets only the key file's client through the CURVE sockets of one context. `close()` ends its thread."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", client_public: str) -> None:
        from zmq.auth.thread import ThreadAuthenticator  # loads asyncio: 20 ms that a start over ipc need not take

        self._thread = ThreadAuthenticator(context)
        self._thread.start()
        self._thread.configure_curve_callback("*", credentials_provider=_OneClient(client_public))

    def close(self) -> None:
        self._thread.stop()


def new_socket(context: "zmq.Context[zmq.Socket[bytes]]", kind: int) -> "zmq.Socket[bytes]":
    """A socket with the options all of ours share: bounded frames, unbounded queues, no lingering at close."""
    socket = context.socket(kind)
    socket.linger = 0
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    if kind == zmq.ROUTER:
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # sending to a peer that is gone raises instead of dropping
    return socket


def bind(socket: "zmq.Socket[bytes]", endpoint: str) -> tuple[str, Authenticator | None]:
    """Binds `socket`; returns the endpoint as bound (with the port the system chose) and the authenticator for tcp.

    Raises ConfigError where the endpoint is wrong or in use.
    """
    parsed = Endpoint.parse(endpoint)
    authenticator = None
    if parsed.key_file is None and is_served(parsed.address):  # ZeroMQ would silently take the name away from the other
        raise ConfigError(f"cannot listen on {endpoint}: address already in use")
    if parsed.key_file is not None:
        keys = load_keys(parsed.key_file, create=True)
        authenticator = Authenticator(socket.context, keys.client_public)
        socket.curve_secretkey = keys.server_secret.encode()
        socket.curve_publickey = keys.server_public.encode()
        socket.curve_server = True
        _start_heartbeats(socket)
    try:
        socket.bind(parsed.address)
    except zmq.ZMQError as error:
        if authenticator is not None:
            authenticator.close()
        raise ConfigError(f"cannot listen on {endpoint}: {zmq.strerror(error.errno or 0)}") from error
    bound = socket.getsockopt_string(zmq.LAST_ENDPOINT)
    return (f"{bound}?key={parsed.key_file}" if parsed.key_file is not None else bound), authenticator


def is_served(address: str) -> bool:
    """Whether somebody listens on `ipc://PATH`; the file of one who ended without removing it is no sign of life."""
    with stdlib_socket.socket(stdlib_socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(address.removeprefix("ipc://"))
        except OSError:
            return False
    return True


def remove_socket_file(endpoint: str) -> None:
    """Removes the file of an ipc endpoint, which ZeroMQ leaves behind; nothing for tcp.

    Its owner does so before it closes the socket: once nobody listens, another may have taken the name.
    """
    address = Endpoint.parse(endpoint).address
    if address.startswith("ipc://"):
        pathlib.Path(address.removeprefix("ipc://")).unlink(missing_ok=True)


def connect(socket: "zmq.Socket[bytes]", endpoint: str) -> None:
    """Dials `endpoint`. ZeroMQ connects in the background: an absent peer shows as silence, not as an error here."""
    parsed = Endpoint.parse(endpoint)
    if parsed.key_file is not None:
        keys = load_keys(parsed.key_file, create=False)
        socket.curve_serverkey = keys.server_public.encode()
        socket.curve_publickey = keys.client_public.encode()
        socket.curve_secretkey = keys.client_secret.encode()
        _start_heartbeats(socket)
    try:
        socket.connect(parsed.address)
    except zmq.ZMQError as error:
        raise ConfigError(f"cannot dial {endpoint}: {error}") from error


def _start_heartbeats(socket: "zmq.Socket[bytes]") -> None:
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_INTERVAL_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TTL, HEARTBEAT_TIMEOUT_MS)


def make_runtime_dir(pid: int) -> pathlib.Path:
    """A new folder (mode 0700) for one engine's sockets, short enough for ipc paths whatever TMPDIR is."""
    prefix = f"{_RUNTIME_DIR_PREFIX}{pid}-"
    folder = tempfile.gettempdir()
    if len(folder.encode()) + len(prefix) + 8 + len("/frontends") > MAX_IPC_PATH_BYTES:
        folder = "/tmp"
    return pathlib.Path(tempfile.mkdtemp(prefix=prefix, dir=folder))


def runtime_dir_of(endpoint: str) -> pathlib.Path | None:
    """The runtime folder that an ipc endpoint's socket lies in, None if it lies elsewhere.

    A child that knows no more than where to dial can so remove what a parent that was killed leaves behind.
    """
    folder = pathlib.Path(Endpoint.parse(endpoint).address.removeprefix("ipc://")).parent
    return folder if folder.name.startswith(_RUNTIME_DIR_PREFIX) else None


class Decoder(Generic[T]):
    """A typed MessagePack decoder: whatever is not a valid message of the link raises ProtocolError."""

    def __init__(self, message_type: Any) -> None:  # Any: a union of types is no `type[T]` for mypy
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(message_type)

    def decode(self, frame: bytes) -> T:
        try:
            return self._decoder.decode(frame)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:  # msgspec lets the second one out
            raise ProtocolError(f"frame of {len(frame)} bytes is no valid message: {error}") from error


_ENCODER: Final = msgspec.msgpack.Encoder()


def encode(message: msgspec.Struct) -> bytes:
    """`message` as one MessagePack frame."""
    return _ENCODER.encode(message)
