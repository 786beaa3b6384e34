"""What an engine that is compared must offer. Standard library only: it runs under every peer's own interpreter."""

from typing import NamedTuple, Protocol


class PeerError(RuntimeError):
    """A peer cannot do what it was asked for; the others go on."""


class Options(NamedTuple):
    """How a peer is to be opened.

    Attributes:
        model: folder with config.json and safetensors in bfloat16.
        form: the same model as the peer wants it (a GGUF file, a folder of OpenVINO); the folder itself for others.
        threads: threads that compute.
        max_model_len: longest prompt and answer in tokens; None for an engine that is not told (`catalog.Kind.sizes`).
        max_num_seqs: most requests at once; None likewise.
    """

    model: str
    form: str
    threads: int
    max_model_len: int | None = None
    max_num_seqs: int | None = None


class Answer(NamedTuple):
    """One call's result.

    Attributes:
        seconds: of the whole call.
        first_s: from its begin until every request had its first token.
        prompts: the ids as the engine itself saw them.
        token_ids: each answer.
    """

    seconds: float
    first_s: float
    prompts: list[list[int]]
    token_ids: list[list[int]]


class Peer(Protocol):
    """An open engine."""

    version: str

    def answer(self, prompts: list[list[int]], num_tokens: int) -> Answer:
        """Greedy answers of exactly `num_tokens` tokens, the end-of-sequence token being one like all others."""
