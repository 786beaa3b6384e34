"""How peers are found, started and given the model."""

import pathlib
import sys

import pytest

from bench.peers import catalog
from bench.peers.peer import PeerError
from tests.sources import ROOT

SIZES = {"threads": 2, "max_model_len": 100, "max_num_seqs": 4}


def test_every_engine_has_its_file() -> None:
    for kind in catalog.KINDS.values():
        assert (ROOT / "bench" / "peers" / f"{kind.file}.py").is_file()


def test_help_says_how_every_peer_is_installed() -> None:
    text = catalog.install_help()
    for name, kind in catalog.KINDS.items():
        assert (name in catalog.NO_PEERS) or (
            f"  {name}: {kind.title}\n" in text and kind.install.split("\n")[0] in text
        )


def test_a_package_is_looked_for_in_the_peers_interpreter() -> None:
    kind = catalog.KINDS["own"]
    assert catalog.is_installed(kind._replace(package="json"), sys.executable)
    assert not catalog.is_installed(kind._replace(package="no_such_package"), sys.executable)


def test_a_peers_threads_are_bound_by_its_environment() -> None:
    kind = catalog.KINDS["vllm"]
    command = catalog.command_for(kind, "/venv/python", pathlib.Path("model"), pathlib.Path("form"), SIZES)
    assert command[:2] == ["env", "OMP_NUM_THREADS=2"]
    assert "VLLM_CPU_NUM_OF_RESERVED_CPU=0" in command
    assert command[command.index("/venv/python") :] == [
        "/venv/python",
        *("-m", "bench.peers.worker", "vllm_cpu", "--model=model", "--form=form"),
        *("--threads=2", "--max-model-len=100", "--max-num-seqs=4"),
    ]


def test_every_peer_is_told_the_sizes_that_it_uses_and_no_others() -> None:
    for kind in catalog.KINDS.values():
        source = (ROOT / "bench" / "peers" / f"{kind.file}.py").read_text(encoding="utf-8")
        used = {name for name in ("max_model_len", "max_num_seqs") if f"options.{name}" in source}
        command = catalog.command_for(kind, "python", pathlib.Path("model"), pathlib.Path("form"), SIZES)
        told = {word for word in command if word.startswith("--max-")}
        assert told == {f"--{name.replace('_', '-')}={SIZES[name]}" for name in used}, kind.title


def test_our_own_engine_sets_its_threads_itself() -> None:
    kind = catalog.KINDS["own"]
    command = catalog.command_for(kind, "python", pathlib.Path("model"), pathlib.Path("model"), SIZES)
    assert command[:2] == ["env", "python"]


def test_most_peers_take_the_folder_as_it_is(tmp_path: pathlib.Path) -> None:
    model = tmp_path / "model"
    assert catalog.KINDS["transformers"].form(model, tmp_path, "python") == model


def test_a_file_that_is_there_is_not_written_again(tmp_path: pathlib.Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"x")
    assert catalog.as_gguf(tmp_path / "model", tmp_path, "python") == tmp_path / "model.gguf"
    (tmp_path / "model-openvino").mkdir()
    (tmp_path / "model-openvino" / "openvino_model.bin").write_bytes(b"x")
    assert catalog.as_openvino(tmp_path / "model", tmp_path, "python") == tmp_path / "model-openvino"


def make_llama_cpp(folder: pathlib.Path, quantize: str) -> str:
    """An interpreter whose `llama_cpp.llama_model_quantize(source, target, params)` has this body."""
    (folder / "packages").mkdir()
    (folder / "packages" / "llama_cpp.py").write_text(
        "import ctypes\nLLAMA_FTYPE_MOSTLY_Q4_1 = 3\n"
        "class Params(ctypes.Structure):\n    _fields_ = [('ftype', ctypes.c_int)]\n"
        "llama_model_quantize_default_params = Params\n"
        f"def llama_model_quantize(source, target, params):\n    {quantize}\n"
    )
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={folder}/packages exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return str(python)


def test_llama_cpps_four_bits_are_made_by_itself_and_once(tmp_path: pathlib.Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"16 bits")
    python = make_llama_cpp(tmp_path, "open(target, 'wb').write(b'4: ' + open(source, 'rb').read()); return 0")
    path = catalog.as_q4_1(tmp_path / "model", tmp_path, python)
    assert path.read_bytes() == b"4: 16 bits"
    assert catalog.as_q4_1(tmp_path / "model", tmp_path, "no interpreter") == path


def test_a_model_that_llama_cpp_does_not_quantize_says_why(tmp_path: pathlib.Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"x")
    with pytest.raises(PeerError, match="cannot quantize the model: OSError: no room"):
        catalog.as_q4_1(tmp_path / "model", tmp_path, make_llama_cpp(tmp_path, "raise OSError('no room')"))
    assert not (tmp_path / "model-q4_1.gguf").exists()


def make_converter(folder: pathlib.Path, script: str) -> str:
    """An interpreter's path beside which `optimum-cli` is this script."""
    folder.mkdir()
    converter = folder / "optimum-cli"
    converter.write_text(f"#!/bin/sh\n{script}\n")
    converter.chmod(0o755)
    return str(folder / "python")


def test_openvinos_model_is_made_beside_its_interpreter(tmp_path: pathlib.Path) -> None:
    python = make_converter(tmp_path / "bin", f'echo "$@" > {tmp_path}/given')
    folder = catalog.as_openvino(tmp_path / "model", tmp_path, python)
    given = (tmp_path / "given").read_text().split()
    assert given[:2] == ["export", "openvino"]
    assert given[-3:] == ["--model", str(tmp_path / "model"), str(folder)]


def test_a_model_that_cannot_be_converted_says_why(tmp_path: pathlib.Path) -> None:
    python = make_converter(tmp_path / "bin", "echo 'KeyError: no_such_kind' >&2; exit 1")
    with pytest.raises(PeerError, match="cannot convert the model: KeyError: no_such_kind"):
        catalog.as_openvino(tmp_path / "model", tmp_path, python)


def test_a_missing_converter_says_so(tmp_path: pathlib.Path) -> None:
    with pytest.raises(PeerError, match="optimum-cli"):
        catalog.as_openvino(tmp_path / "model", tmp_path, str(tmp_path / "python"))


@pytest.mark.parametrize(("text", "last"), [("a\nb \n\n", "b"), ("", "nothing"), ("x" * 400, "x" * 300)])
def test_the_last_line_that_says_something(text: str, last: str) -> None:
    assert catalog.last_line(text) == last
