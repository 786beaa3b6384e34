"""What an answer must look like, compiled against the model's vocabulary: which tokens may come next. Over llguidance.

A grammar is enforced or refused, never ignored: features of JSON Schema that llguidance does not know are errors, its
options that would approximate are switched off, keywords that are none are refused (`schema_keywords`), and so are
warnings. The first mask is part of compiling, so that a request enters the queue with it.

The end. Where the text is complete, a request's own stop set is allowed beside the tokens that go on; where nothing can
follow, the answer is over without another token. llguidance's idea of an EOS token is not used: it has one for all.
"""

import json
import pathlib
import re
from typing import Any, Final

import llguidance
import numpy as np
import numpy.typing as npt

from folovllm.common.messages.frontend_core import Grammar
from folovllm.core_proc.request import Tokens
from folovllm.core_proc.schema_keywords import unknown_keyword

Words = npt.NDArray[np.uint32]

# A model that is at a loss writes blanks for ever; this many between two parts are enough for any indentation.
_WHITESPACE: Final = r"[\x20\x0A\x0D\x09]{1,64}"
_OVERRIDES: Final[dict[str, Any]] = {"lenient": False, "coerce_one_of": False}
_REGEX_SIGNS: Final = frozenset("\\.+*?()|[]{}^$#&-~/")
_OPTIONS: Final = "%llguidance"
# Where only one text can follow, llguidance would allow that text's own tokens alone; and where it contains that of a
# special token, even this one, which is no text at all.
_NO_FORCING: Final = f'\n{_OPTIONS} {{"no_forcing": true}}\n'  # at the end: line numbers in errors are the user's
# Where a user wrote no Lark, its place and line in ours tell nothing.
_OWN_SOURCE: Final = re.compile(r"^at \d+\(\d+\): |\n +\d+ \| .*", re.DOTALL)
_OWN_OPTIONS: Final = re.compile(r"\n +\d+ \| %llguidance .*")
_LARK_TEMPERATURE: Final = "temperature"
_MAX_CAUSE_CHARACTERS: Final = 1000
_NON_VERBOSE: Final = "<non-verbose/>"


class GrammarError(Exception):
    """The grammar cannot be enforced; the text is the cause."""


class Vocabulary:
    """The bytes of every token.

    Args:
        tokenizer_json: text of the model's tokenizer.json.
        num_valid_token_ids: masks have a bit for each id below it.
    """

    def __init__(self, tokenizer_json: str, num_valid_token_ids: int) -> None:
        """Takes 0.3 s for 49,000 tokens and 0.9 s for 152,000, during which no other thread of the process runs.

        Raises:
            GrammarError: llguidance cannot read the tokenizer.
        """
        try:
            self.tokenizer = llguidance.LLTokenizer(tokenizer_json)
        except ValueError as error:
            raise GrammarError(f"the model's tokenizer.json cannot be used for grammars: {error}") from error
        self.num_valid_token_ids = num_valid_token_ids
        self.num_words = -(-num_valid_token_ids // 32)
        self._end_ids = np.array(self.tokenizer.eos_tokens, np.int64)

    @classmethod
    def from_folder(cls, folder: pathlib.Path, num_valid_token_ids: int) -> "Vocabulary":
        """Raises GrammarError where the folder has no usable tokenizer.json."""
        path = folder / "tokenizer.json"
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise GrammarError(f"the model has no tokenizer.json that can be read: {error}") from error
        return cls(text, num_valid_token_ids)

    def words(self, bits: bytes, *, is_accepting: bool) -> Words:
        """llguidance's mask, cut or filled up to the ids that can be sampled; the end of the text is not in it."""
        words = np.zeros(self.num_words, np.uint32)
        given = np.frombuffer(bits, "<u4")[: self.num_words]
        words[: given.size] = given
        if self.num_valid_token_ids % 32:
            words[-1] &= np.uint32((1 << self.num_valid_token_ids % 32) - 1)
        if is_accepting:
            for token_id in self._end_ids[self._end_ids < self.num_valid_token_ids].tolist():
                words[token_id // 32] &= np.uint32(~(1 << token_id % 32) & 0xFFFFFFFF)
        return words


class CompiledGrammar:
    """A grammar at its beginning. Shared by all answers that follow it; never moved on itself."""

    def __init__(self, grammar: Grammar, vocabulary: Vocabulary) -> None:
        """Raises GrammarError with the cause."""
        source = _source(grammar)
        limits = llguidance.LLParserLimits(verbose_errors=False)
        self.vocabulary = vocabulary
        self._start = llguidance.LLMatcher(vocabulary.tokenizer, source, log_level=0, limits=limits)
        if self._start.is_error():
            cause = _cause_in(self._start)
            raise GrammarError((_OWN_OPTIONS if grammar.kind == "lark" else _OWN_SOURCE).sub("", cause).strip())
        warnings = self._start.get_grammar_warnings()
        if warnings:
            raise GrammarError("; ".join(warnings)[:_MAX_CAUSE_CHARACTERS])
        first = self._start.compute_bitmask()
        _raise_error_of(self._start)
        self.is_accepting = self._start.is_accepting()
        self.words = vocabulary.words(first, is_accepting=self.is_accepting)
        if not self.words.any():
            what = "only the empty text" if self.is_accepting else "no text at all"
            raise GrammarError(f"{what} fits it, as far as the model's tokens can write it")

    def copy_start(self) -> llguidance.LLMatcher:
        """A matcher of an answer's own."""
        return self._start.deep_copy()


class Matcher:
    """How far one answer has come in its grammar. Only confirmed tokens move it.

    Attributes:
        words: which tokens may come next, without the end.
        is_complete: nothing can follow: the answer is over.
        error: why it cannot go on, "" while it can.
        num_tokens: tokens taken in.
    """

    def __init__(self, grammar: CompiledGrammar, stop_token_ids: Tokens) -> None:
        self._vocabulary = grammar.vocabulary
        self._matcher = grammar.copy_start()
        stops = stop_token_ids[stop_token_ids < grammar.vocabulary.num_valid_token_ids].astype(np.int64)
        self._stop_words = np.zeros(grammar.vocabulary.num_words, np.uint32)
        np.bitwise_or.at(self._stop_words, stops // 32, (1 << (stops % 32)).astype(np.uint32))
        self.is_complete = False
        self.error = ""
        self.num_tokens = 0
        self.mask = self._mask(grammar.words, grammar.is_accepting)

    def take(self, token_id: int) -> bytes | None:
        """Moves on by a token; the next mask as in SchedulerOutput.token_masks, None if the answer cannot go on."""
        self.num_tokens += 1
        if not self._matcher.consume_token(token_id):
            self.error = f"token {token_id} does not fit the grammar: {_cause_in(self._matcher)}"
            return None
        bits = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            self.error = f"the grammar cannot be followed any further: {_cause_in(self._matcher)}"
            return None
        is_accepting = self._matcher.is_accepting()
        words = self._vocabulary.words(bits, is_accepting=is_accepting)
        if words.any():
            return self._mask(words, is_accepting)
        if is_accepting:
            self.is_complete = True
        else:
            self.error = "no token of the model fits the grammar here"
        return None

    def _mask(self, words: Words, is_accepting: bool) -> bytes:
        return (words | self._stop_words if is_accepting else words).astype("<u4").tobytes()


def _source(grammar: Grammar) -> str:
    """The grammar in llguidance's form."""
    return llguidance.LLMatcher.grammar_from_lark(_as_lark(grammar) + _NO_FORCING)


def _as_lark(grammar: Grammar) -> str:
    match grammar.kind:
        case "json":
            return _json_lark(grammar.text)
        case "json_object":
            return _json_lark('{"type": "object"}')
        case "regex":
            return _regex_lark(grammar.text)
        case "choice":
            return _choice_lark(grammar.text)
        case "lark":
            return _checked_lark(grammar.text)


def _json_lark(text: str) -> str:
    try:
        schema = json.loads(text)
        if schema is True:
            schema = {}
        if not isinstance(schema, dict):
            raise GrammarError("the schema must be a JSON object, or true; nothing fits false")
        keyword = unknown_keyword(schema)
        if keyword:
            raise GrammarError(f"{keyword} is no keyword of JSON Schema, so it would have no effect")
        options = schema.get("x-guidance", {})
        if not isinstance(options, dict):
            raise GrammarError("x-guidance must be a JSON object")
        if "whitespace_flexible" not in options:
            options = {"whitespace_pattern": _WHITESPACE, **options}
        return "start: %json " + json.dumps(schema | {"x-guidance": options | _OVERRIDES})
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"the schema is not valid JSON: {error}") from error


def _regex_lark(regex: str) -> str:
    """llguidance quotes it, so that a slash or a line break inside does not end it."""
    source = json.loads(llguidance.LLMatcher.grammar_from_regex(regex))
    return str(source["grammars"][0]["lark_grammar"])


def _choice_lark(text: str) -> str:
    try:
        choices = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"the choices are not valid JSON: {error}") from error
    is_list = isinstance(choices, list) and all(isinstance(choice, str) and choice for choice in choices)
    if not is_list or not choices:
        raise GrammarError("the choices must be a list of texts, none of them empty")
    return _regex_lark("|".join(map(_escaped, choices)))


def _escaped(text: str) -> str:
    return "".join("\\" + sign if sign in _REGEX_SIGNS else sign for sign in text)


def _checked_lark(text: str) -> str:
    if not text.strip():
        raise GrammarError("the grammar is empty")
    if _OPTIONS in text:
        raise GrammarError(f"{_OPTIONS} is not supported: its options are the engine's")
    attributes = [part.partition("]")[0] for part in text.split("[")[1:]]
    if any(_LARK_TEMPERATURE in part and "=" in part for part in attributes):
        raise GrammarError("a temperature inside a grammar is not supported; it is set for the whole answer")
    return text


def _raise_error_of(matcher: llguidance.LLMatcher) -> None:
    if matcher.is_error():
        raise GrammarError(_cause_in(matcher))


def _cause_in(matcher: llguidance.LLMatcher) -> str:
    return matcher.get_error().replace(_NON_VERBOSE, "").strip()[:_MAX_CAUSE_CHARACTERS]
