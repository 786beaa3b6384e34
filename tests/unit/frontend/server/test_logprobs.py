"""Which tokens a piece of text is made of, wherever a stream is cut."""

from folovllm.frontend.outputs import Logprob
from folovllm.frontend.server.logprobs import content_logprobs, tokens_behind
from folovllm.frontend.tokenizer import Tokenizer
from tests.fakes.model_folder import byte_vocabulary
from tests.fakes.tokenizers_ import byte_level_backend

TEXTS = {72: "H", 0xC3: "", 0xA9: "é", 33: "!"}  # the second byte of é shows it
Token = tuple[int, dict[int, Logprob]]


def tokens(*numbers: int) -> list[Token]:
    return [(number, {number: Logprob(-number / 1000, 1, TEXTS[number])}) for number in numbers]


def test_the_first_bytes_of_a_character_wait_for_the_piece_that_shows_it() -> None:
    assert tokens_behind(tokens(72, 0xC3)) == tokens(0xC3)
    assert tokens_behind(tokens(0xC3)) == tokens(0xC3)
    assert tokens_behind(tokens(0xC3, 0xA9)) == []
    assert tokens_behind([]) == []


def test_every_cut_of_a_stream_tells_every_token_once() -> None:
    tokenizer = Tokenizer(byte_level_backend(byte_vocabulary()), config={})
    whole = tokens(72, 0xC3, 0xA9, 33)
    for first in range(len(whole) + 1):
        for second in range(first, len(whole) + 1):
            told: list[list[int] | None] = []
            waiting: list[Token] = []
            for piece in (whole[:first], whole[first:second], whole[second:]):
                waiting += piece
                text = "".join(TEXTS[number] for number, _ in piece)
                if text:
                    told += [entry.bytes for entry in content_logprobs(tokenizer, waiting, text, text, 1)]
                    waiting = tokens_behind(waiting)
            assert told == [[72], [0xC3], [0xA9], [33]], (first, second)
