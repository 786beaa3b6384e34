"""llama.cpp's batches, with a library that notes what it is given."""

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest

from bench.peers import llamacpp
from bench.peers.peer import Options

OPTIONS = Options("model", "model.gguf", threads=2)


class FakeLibrary(SimpleNamespace):
    """Token of a place: 10 · its request + its position. Only what `LlamaCpp` calls."""

    __version__ = "0"
    llama_log_callback = staticmethod(lambda function: function)

    def __init__(self) -> None:
        super().__init__()
        self.decoded: list[list[tuple[int, int, int, bool]]] = []
        self.cleared = 0
        self.code = 0
        self.model: object | None = object()
        self.contexts: list[SimpleNamespace] = []

    def llama_log_set(self, callback: object, data: object) -> None: ...

    def llama_backend_init(self) -> None: ...

    def llama_model_default_params(self) -> object:
        return object()

    def llama_model_load_from_file(self, path: bytes, params: object) -> object | None:
        assert path == b"model.gguf"
        return self.model

    def llama_sampler_init_greedy(self) -> object:
        return object()

    def llama_batch_init(self, size: int, embedding: int, num_seqs: int) -> Any:
        rows = [(ctypes.c_int32 * 1)() for _ in range(size)]
        numbers = {name: (ctypes.c_int32 * size)() for name in ("token", "pos", "n_seq_id", "logits")}
        return SimpleNamespace(n_tokens=0, seq_id=rows, **numbers)

    def llama_context_default_params(self) -> SimpleNamespace:
        return SimpleNamespace()

    def llama_init_from_model(self, model: object, params: SimpleNamespace) -> SimpleNamespace:
        self.contexts.append(params)
        return params

    def llama_get_memory(self, context: object) -> object:
        return context

    def llama_memory_clear(self, memory: object, data: bool) -> None:
        self.cleared += 1

    def llama_decode(self, context: object, batch: Any) -> int:
        self.decoded.append(
            [(batch.token[i], batch.pos[i], batch.seq_id[i][0], bool(batch.logits[i])) for i in range(batch.n_tokens)]
        )
        return self.code

    def llama_sampler_sample(self, sampler: object, context: object, place: int) -> int:
        _, position, request, is_last = self.decoded[-1][place]
        assert is_last
        return 10 * request + position


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    library = FakeLibrary()
    monkeypatch.setattr("importlib.import_module", lambda name: library)
    return library


def test_prompts_are_cut_into_batches_and_only_their_ends_have_logits() -> None:
    batches = llamacpp.prompt_batches([[5, 6, 7], [8, 9]], 4)
    assert batches == [[(5, 0, 0, False), (6, 1, 0, False), (7, 2, 0, True), (8, 0, 1, False)], [(9, 1, 1, True)]]


def test_all_requests_go_on_in_one_batch(library: FakeLibrary) -> None:
    answer = llamacpp.open_peer(OPTIONS).answer([[5, 6, 7], [8, 9]], 3)
    assert answer.token_ids == [[2, 3, 4], [11, 12, 13]]
    assert answer.prompts == [[5, 6, 7], [8, 9]]
    assert library.decoded[1:] == [[(2, 3, 0, True), (11, 2, 1, True)], [(3, 4, 0, True), (12, 3, 1, True)]]
    assert 0 < answer.first_s <= answer.seconds


def test_a_context_fits_its_requests_and_is_kept(library: FakeLibrary) -> None:
    peer = llamacpp.open_peer(OPTIONS)
    for _ in range(2):
        peer.answer([[1] * 250] * 3, 10)
    peer.answer([[1]], 2)
    shapes = [(each.n_ctx, each.n_seq_max, each.n_threads, each.n_threads_batch) for each in library.contexts]
    assert shapes == [(3 * 512, 3, 2, 2), (256, 1, 2, 2)]
    assert library.cleared == 3


def test_faults_are_told(library: FakeLibrary) -> None:
    peer = llamacpp.open_peer(OPTIONS)
    library.code = 1
    with pytest.raises(RuntimeError, match="llama_decode gives 1"):
        peer.answer([[1]], 1)
    library.model = None
    with pytest.raises(RuntimeError, match=r"cannot load model\.gguf"):
        llamacpp.open_peer(OPTIONS)
