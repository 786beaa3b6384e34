"""What masks allow fits the grammar, always; what cannot be enforced is refused with the cause."""

import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jsonschema
import numpy as np
import pytest

from folovllm.common.messages.frontend_core import Grammar
from folovllm.core_proc.grammar import CompiledGrammar, GrammarError, Matcher, Vocabulary
from tests.fakes.schemas import ENFORCED, REFUSED

END = 2  # SmolLM2's <|im_end|>
NUM_IDS = 49152
NUM_GENERATIONS = 20
MAX_TOKENS = 150


@pytest.fixture(scope="module")
def vocabulary(demo_model_dir: pathlib.Path) -> Vocabulary:
    return Vocabulary.from_folder(demo_model_dir, NUM_IDS)


@pytest.fixture(scope="module")
def writers(vocabulary: Vocabulary) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Tokens that a random writer prefers, so that its texts come to an end: short ones that JSON is made of."""
    texts = [vocabulary.tokenizer.decode_bytes([i]) for i in range(NUM_IDS)]
    return np.flatnonzero([bool(re.fullmatch(rb'[]\[{}",:0-9abcn.-]{1,2}', text)) for text in texts])


def allowed(mask: bytes) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.flatnonzero(np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little"))


class RandomWriter:
    """Draws among the allowed tokens, half of the time among the short ones; ends where it may, half of the time."""

    def __init__(self, vocabulary: Vocabulary, preferred: np.ndarray[Any, np.dtype[np.int64]], seed: int = 0) -> None:
        self._vocabulary, self._preferred = vocabulary, preferred
        self._random = np.random.default_rng(seed)

    def write(self, compiled: CompiledGrammar) -> str | None:
        """A text, or None where it found no end."""
        matcher = Matcher(compiled, np.array([END], np.int32))
        mask: bytes | None = matcher.mask
        tokens: list[int] = []
        while mask is not None and len(tokens) < MAX_TOKENS:
            choice = allowed(mask)
            assert choice.size and choice[-1] < NUM_IDS
            if END in choice and self._random.random() < 0.5:
                return self._text(tokens)
            choice = choice[choice != END]
            if not choice.size:
                return self._text(tokens)
            short = choice[np.isin(choice, self._preferred)]
            tokens.append(int(self._random.choice(short if short.size and self._random.random() < 0.8 else choice)))
            mask = matcher.take(tokens[-1])
        assert not matcher.error
        return self._text(tokens) if matcher.is_complete else None

    def _text(self, tokens: list[int]) -> str:
        return self._vocabulary.tokenizer.decode_bytes(tokens).decode()


def texts_of(
    grammar: Grammar, vocabulary: Vocabulary, writers: np.ndarray[Any, np.dtype[np.int64]], check: Callable[[str], None]
) -> None:
    """At least 20 whole texts, each checked."""
    compiled = CompiledGrammar(grammar, vocabulary)
    writer = RandomWriter(vocabulary, writers)
    num_whole = 0
    for _ in range(10 * NUM_GENERATIONS):
        text = writer.write(compiled)
        if text is not None:
            check(text)
            num_whole += 1
        if num_whole == NUM_GENERATIONS:
            return
    pytest.fail(f"only {num_whole} texts found an end")


@pytest.mark.parametrize("name", ENFORCED)
def test_schemas_are_enforced(name: str, vocabulary: Vocabulary, writers: np.ndarray[Any, np.dtype[np.int64]]) -> None:
    schema = ENFORCED[name]
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    texts_of(
        Grammar("json", json.dumps(schema)), vocabulary, writers, lambda text: validator.validate(json.loads(text))
    )


def test_blanks_between_the_parts_are_bounded_and_can_be_forbidden(
    vocabulary: Vocabulary, writers: np.ndarray[Any, np.dtype[np.int64]]
) -> None:
    schema = ENFORCED["strict tool"]
    matcher = Matcher(CompiledGrammar(Grammar("json", json.dumps(schema)), vocabulary), np.array([END], np.int32))
    mask: bytes | None = matcher.take(token(vocabulary, "{"))
    blank, num_blanks = token(vocabulary, " "), 0
    while mask is not None and blank in allowed(mask):
        mask = matcher.take(blank)
        num_blanks += 1
    assert num_blanks == 64

    def check(text: str) -> None:
        assert re.fullmatch(r'\{"a":-?[0-9]+\}', text)

    texts_of(Grammar("json", json.dumps(ENFORCED["no blanks"])), vocabulary, writers, check)


@pytest.mark.parametrize("name", REFUSED)
def test_L28_schemas_that_cannot_be_enforced_are_refused_with_the_cause(name: str, vocabulary: Vocabulary) -> None:
    schema, cause = REFUSED[name]
    with pytest.raises(GrammarError, match=re.escape(cause)):
        CompiledGrammar(Grammar("json", json.dumps(schema)), vocabulary)


REGEXES = {
    "words": "(red|green|blue)( light)?",
    "numbers": r"-?(0|[1-9][0-9]{0,4})(\.[0-9]{1,3})?",
    "a slash and a line": "a/b\nc{2}",
    "date": r"\d{4}-\d{2}-\d{2}",
    "beyond ASCII": "[äöü世🦜]{1,6}",
    "not": "[^a-z]{2,5}",
    "counted": "(ab){3,7}",
    "anchored": "^x+y$",
}


@pytest.mark.parametrize("name", REGEXES)
def test_regular_expressions_fit_the_whole_text(
    name: str, vocabulary: Vocabulary, writers: np.ndarray[Any, np.dtype[np.int64]]
) -> None:
    def check(text: str) -> None:
        assert re.fullmatch(REGEXES[name], text), text

    texts_of(Grammar("regex", REGEXES[name]), vocabulary, writers, check)


CHOICES = [
    ["yes", "no"],
    ["a", "ab", "abc"],
    ["a.b*", "c\\d", "[x]", "{1}", "(", "^$", "a/b", "q'\"", "#", "~&-"],
    ["two\nlines", "\ttab", " blank "],
    ["世界", "🦜", "é"],
    ["<|im_end|>"],  # the text, not the token
    [f"choice {i}" for i in range(2000)],
]


@pytest.mark.parametrize("choices", CHOICES, ids=range(len(CHOICES)))
def test_choices_are_taken_word_for_word(
    choices: list[str], vocabulary: Vocabulary, writers: np.ndarray[Any, np.dtype[np.int64]]
) -> None:
    seen: set[str] = set()

    def check(text: str) -> None:
        assert text in choices
        seen.add(text)

    texts_of(Grammar("choice", json.dumps(choices)), vocabulary, writers, check)
    assert len(seen) >= min(2, len(choices))


ARITHMETIC = """
start: sum
sum: product ("+" product)*
product: atom ("*" atom)*
atom: /[1-9][0-9]?/ | "(" sum ")"
"""


def test_lark_grammars(vocabulary: Vocabulary, writers: np.ndarray[Any, np.dtype[np.int64]]) -> None:
    def check(text: str) -> None:
        assert re.fullmatch(r"[0-9+*()]+", text)
        assert 0 < text.count("(") + 1 == text.count(")") + 1
        compile(text, "answer", "eval")  # Python's own parser takes it

    texts_of(Grammar("lark", ARITHMETIC), vocabulary, writers, check)


def test_any_json_object(vocabulary: Vocabulary, writers: np.ndarray[Any, np.dtype[np.int64]]) -> None:
    def check(text: str) -> None:
        assert isinstance(json.loads(text), dict)

    texts_of(Grammar("json_object", ""), vocabulary, writers, check)


@pytest.mark.parametrize(
    ("grammar", "cause"),
    [
        (Grammar("regex", "(a"), "unclosed group"),
        (Grammar("regex", r"\bfoo\b"), "lookarounds not supported"),
        (Grammar("regex", "(?=a)b"), "look-around"),
        (Grammar("regex", "a{0}"), "only the empty text"),
        (Grammar("regex", "(" * 5000 + "a" + ")" * 5000), "invalid regex"),
        (Grammar("lark", "start: A"), "unknown name"),
        (Grammar("lark", " "), "the grammar is empty"),
        (Grammar("lark", '%llguidance {"no_forcing": false}\nstart: "a"'), "its options are the engine's"),
        (Grammar("lark", "start: " + "(" * 20000 + '"a"' + ")" * 20000), "nested"),
        (Grammar("lark", "start[temperature=0.5]: /a+/"), "temperature"),
        (Grammar("lark", 'start: %json {"x-guidance": {"lenient": true}, "uniqueItems": true}'), "uniqueItems"),
        (Grammar("lark", "start: @elsewhere"), "elsewhere"),
        (Grammar("json", "{"), "not valid JSON"),
        (Grammar("json", "[]"), "must be a JSON object"),
        (Grammar("json", "false"), "must be a JSON object"),
        (Grammar("json", "[" * 100_000), "not valid JSON"),
        (Grammar("json", '{"properties":{"a":' * 300 + "true" + "}}" * 300), "recursion"),
        (Grammar("choice", "{"), "not valid JSON"),
        (Grammar("choice", "[]"), "none of them empty"),
        (Grammar("choice", '["a", ""]'), "none of them empty"),
        (Grammar("choice", "[1]"), "none of them empty"),
    ],
    ids=lambda value: f"{value.kind} {value.text[:20]}" if isinstance(value, Grammar) else "",
)
def test_grammars_that_cannot_be_enforced_are_refused_with_the_cause(
    grammar: Grammar, cause: str, vocabulary: Vocabulary
) -> None:
    with pytest.raises(GrammarError, match=re.escape(cause)):
        CompiledGrammar(grammar, vocabulary)


def test_causes_say_nothing_of_how_a_schema_is_passed_on(vocabulary: Vocabulary) -> None:
    with pytest.raises(GrammarError) as caught:
        CompiledGrammar(Grammar("json", '{"type": "objekt"}'), vocabulary)
    assert str(caught.value) == "failed to compile JSON schema: Invalid type: objekt"
    with pytest.raises(GrammarError) as caught:
        CompiledGrammar(Grammar("lark", "start: a\na: B"), vocabulary)
    assert str(caught.value).startswith("at 2(4): unknown name") and "llguidance" not in str(caught.value)


def token(vocabulary: Vocabulary, text: str) -> int:
    (token_id,) = vocabulary.tokenizer.tokenize_str(text)
    return token_id


@pytest.mark.parametrize("stops", [[], [END], [0, END, 198], [END, NUM_IDS + 5]])
def test_the_requests_own_stop_set_is_allowed_where_the_text_may_end(stops: list[int], vocabulary: Vocabulary) -> None:
    matcher = Matcher(CompiledGrammar(Grammar("regex", "ab?"), vocabulary), np.array(stops, np.int32))
    assert not set(stops) & set(allowed(matcher.mask).tolist())
    mask = matcher.take(token(vocabulary, "a"))
    assert mask is not None and not matcher.is_complete
    assert set(allowed(mask).tolist()) == {token(vocabulary, "b")} | {stop for stop in stops if stop < NUM_IDS}
    assert matcher.take(token(vocabulary, "b")) is None
    assert (matcher.is_complete, matcher.error, matcher.num_tokens) == (True, "", 2)


def test_a_token_that_does_not_fit_is_an_error(vocabulary: Vocabulary) -> None:
    matcher = Matcher(CompiledGrammar(Grammar("regex", "ab"), vocabulary), np.array([END], np.int32))
    assert matcher.take(token(vocabulary, "b")) is None
    assert "does not fit the grammar" in matcher.error and not matcher.is_complete


def test_matchers_of_one_grammar_do_not_move_each_other(vocabulary: Vocabulary) -> None:
    compiled = CompiledGrammar(Grammar("choice", '["ab", "cd"]'), vocabulary)
    one, other = (Matcher(compiled, np.array([END], np.int32)) for _ in range(2))
    first = other.mask
    mask = one.take(token(vocabulary, "a"))
    assert mask is not None and allowed(mask).tolist() == [token(vocabulary, "b")]
    assert other.mask == first == Matcher(compiled, np.array([END], np.int32)).mask
    mask = other.take(token(vocabulary, "c"))
    assert mask is not None and allowed(mask).tolist() == [token(vocabulary, "d")]


@pytest.mark.parametrize("num_ids", [100, 128, 1000, 49152, 50000])
def test_ids_beyond_the_bound_are_never_allowed(num_ids: int, demo_model_dir: pathlib.Path) -> None:
    vocabulary = Vocabulary.from_folder(demo_model_dir, num_ids)
    matcher = Matcher(CompiledGrammar(Grammar("regex", "(?s:.*)"), vocabulary), np.array([END], np.int32))
    assert len(matcher.mask) == 4 * -(-num_ids // 32)
    assert 50 < allowed(matcher.mask)[-1] < min(num_ids, 49152)
    assert END in allowed(matcher.mask)


def test_a_vocabulary_that_cannot_be_read_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(GrammarError, match=r"no tokenizer\.json that can be read"):
        Vocabulary.from_folder(tmp_path, 10)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(GrammarError, match=r"tokenizer\.json cannot be used"):
        Vocabulary.from_folder(tmp_path, 10)


def test_qwen3_whose_logits_have_more_columns_than_ids(qwen3_tokenizer_dir: pathlib.Path) -> None:
    vocabulary = Vocabulary.from_folder(qwen3_tokenizer_dir, 151669)
    schema = ENFORCED["strict tool"]
    compiled = CompiledGrammar(Grammar("json", json.dumps(schema)), vocabulary)
    matcher = Matcher(compiled, np.array([151645, 151643], np.int32))
    for token_id in vocabulary.tokenizer.tokenize_str('{"city": "Oslo", "unit": "C"'):
        mask = matcher.take(token_id)
        assert mask is not None and allowed(mask)[-1] < 151643
    assert matcher.take(token(vocabulary, "}")) is None
    assert matcher.is_complete
