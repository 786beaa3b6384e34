"""Text ↔ token ids over the `tokenizers` library; no transformers.

What decides what: `tokenizer.json` holds the vocabulary, the splitting and, in its post-processor, whether a bos token
is put in front (Llama 3: yes; Qwen, SmolLM2: no). `tokenizer_config.json` (older folders: `special_tokens_map.json`)
names the special tokens, may add tokens, and carries the chat template, which a file `chat_template.jinja` overrides. A
field `add_bos_token` there has no effect: the post-processor was written from it, and transformers 5 reads it the same
way. Nor has `clean_up_tokenization_spaces`: it would change blanks that the model wrote, and text that is already sent.
"""

import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from folovllm.common.errors import ModelError, RequestError

_SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_DEFAULT_TEMPLATE = "default"
_LONG_TEXT = 20_000  # characters; some 5 ms of work


class Tokenizer:
    """The tokenizer of one model folder. Immutable once made, but for a cache; safe to share between requests.

    Attributes:
        num_ids: largest valid token id + 1. The one bound for prompts, sampler and detokenizer; a model's logits often
            have more columns (Qwen3: 151,669 ids, 151,936 columns).
        special_tokens: name (`bos_token`, …) → text, of those that the folder names.
        special_token_ids: text → id of every special token, named or not.
        chat_templates: name → Jinja2 source; most folders have only `default`.
        byte_level: whether text is the UTF-8 decoding of the tokens' bytes put together and of nothing else.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, *, config: Mapping[str, Any], chat_template_file: str | None = None
    ) -> None:
        """Takes over `backend` and adds to it the tokens that only `config` (tokenizer_config.json) knows."""
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.special_tokens = _named_tokens(config)
        backend.add_tokens(_missing_tokens(backend, config, self.special_tokens))
        added = backend.get_added_tokens_decoder()
        self.special_token_ids = {token.content: token_id for token_id, token in added.items() if token.special}
        self._special_ids = frozenset(self.special_token_ids.values())
        self.num_ids = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.chat_templates = _chat_templates(config, chat_template_file)
        self.byte_level = _is_byte_level(json.loads(backend.decoder.__getstate__()) if backend.decoder else None)
        self._bytes: list[bytes | None] = [None] * self.num_ids

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        """Reads the tokenizer of a Hugging Face folder.

        Raises:
            ModelError: tokenizer.json is missing or cannot be read.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelError(_missing_message(folder))
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception for every fault of the file
            raise ModelError(f"{path} cannot be read as a tokenizer: {error}") from error
        template = folder / "chat_template.jinja"
        config = _read_object(folder / "special_tokens_map.json") | _read_object(folder / "tokenizer_config.json")
        text = template.read_text(encoding="utf-8") if template.is_file() else None
        return cls(backend, config=config, chat_template_file=text)

    def __len__(self) -> int:
        """Number of tokens, added ones included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def vocab_size(self) -> int:
        """Number of tokens without the added ones, as in transformers. For a bound on ids take `num_ids`."""
        return self._backend.get_vocab_size(with_added_tokens=False)

    @property
    def chat_template(self) -> str | None:
        """Jinja2 source of the default chat template, None where the folder has none."""
        return self.chat_templates.get(_DEFAULT_TEMPLATE)

    @property
    def bos_token_id(self) -> int | None:
        return self._special_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._special_id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        return self._special_id("pad_token")

    def _special_id(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self._backend.token_to_id(text)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, the same as transformers' `AutoTokenizer` gives.

        Args:
            text: may contain the text of special tokens, which become these tokens.
            add_special_tokens: put in front (or behind) what the model wants, such as bos. False for a rendered chat,
                whose template has done so.

        Raises:
            RequestError: the text holds a lone surrogate, which no UTF-8 text can.
        """
        try:
            if isinstance(text, str) and len(text) > _LONG_TEXT:  # this form lets other threads run meanwhile
                return self._backend.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (TypeError, UnicodeEncodeError) as error:
            raise _not_text(text) from error

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of a whole sequence of ids; ids that no token has give no text."""
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def convert_ids_to_tokens(self, ids: Iterable[int]) -> list[str | None]:
        """The vocabulary's own spelling of each id (`Ġworld` for " world"), None for an id that no token has."""
        return [self._backend.id_to_token(token_id) for token_id in ids]

    def token_id(self, token: str) -> int | None:
        """The id of a token in the vocabulary's spelling, None where there is none."""
        return self._backend.token_to_id(token)

    def is_special(self, token_id: int) -> bool:
        """Whether `skip_special_tokens` leaves the token out. Added tokens need not be special (Qwen3's `<think>`)."""
        return token_id in self._special_ids

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token of a byte-level tokenizer stands for; b"" for an id that no token has."""
        if not 0 <= token_id < self.num_ids:
            return b""
        known = self._bytes[token_id]
        if known is None:
            known = self._bytes[token_id] = _unspell(self._backend.id_to_token(token_id) or "")
        return known


def _missing_message(folder: Path) -> str:
    names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    message = f"{folder} has no tokenizer.json"
    if "tokenizer.model" in names:
        message += (
            "; it only has a sentencepiece tokenizer.model, which is not supported: convert it once with transformers "
            "(AutoTokenizer.from_pretrained(folder).save_pretrained(folder) writes tokenizer.json)"
        )
    return message


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold a JSON object")
    return value


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token and so on; a token is given as a text or as an object with its text in `content`."""
    named = {}
    for name in _SPECIAL_TOKEN_NAMES:
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            named[name] = text
    return named


def _missing_tokens(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], named: Mapping[str, str]
) -> list[tokenizers.AddedToken]:
    """Tokens that the config adds to those in tokenizer.json, in the order of their ids; named ones are special."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    wanted: dict[str, tokenizers.AddedToken] = {}
    for _, entry in sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0])):
        special = entry.get("special", False) or entry["content"] in named.values()
        flags = {flag: entry.get(flag, False) for flag in ("lstrip", "rstrip", "single_word", "normalized")}
        wanted[entry["content"]] = tokenizers.AddedToken(entry["content"], special=special, **flags)
    for text in named.values():
        wanted.setdefault(text, tokenizers.AddedToken(text, special=True, normalized=False))
    return [token for text, token in wanted.items() if text not in known]


def _chat_templates(config: Mapping[str, Any], file_text: str | None) -> dict[str, str]:
    if file_text is not None:
        return {_DEFAULT_TEMPLATE: file_text}
    given = config.get("chat_template")
    if isinstance(given, str):
        return {_DEFAULT_TEMPLATE: given}
    if isinstance(given, list):
        return {entry["name"]: entry["template"] for entry in given}
    return {}


def _is_byte_level(decoder: Any) -> bool:
    """Whether the decoder (as in tokenizer.json) is ByteLevel alone, perhaps wrapped in a sequence of one."""
    if decoder is None:
        return False
    if decoder["type"] == "Sequence":
        parts = decoder["decoders"]
        return len(parts) == 1 and _is_byte_level(parts[0])
    return bool(decoder["type"] == "ByteLevel")


def _byte_spelling() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 characters stand for themselves, the others for U+0100 and up."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    shown = set(printable)
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


_BYTE_OF = _byte_spelling()


def _unspell(token: str) -> bytes:
    """A token spelled in bytes gives these; one with any other character (an added token) is taken as plain text."""
    try:
        return bytes([_BYTE_OF[character] for character in token])
    except KeyError:
        return token.encode("utf-8")


def _not_text(text: object) -> RequestError:
    if not isinstance(text, str):
        return RequestError(f"a prompt must be a string, not {type(text).__name__}", "prompt")
    position = next((i for i, c in enumerate(text) if unicodedata.category(c) == "Cs"), -1)
    character = f"U+{ord(text[position]):04X} at position {position}" if position >= 0 else "an unknown character"
    return RequestError(f"the text holds a lone surrogate ({character}), which is not valid Unicode text", "prompt")
