"""Small tokenizers built on the spot."""

from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from folovllm.frontend.tokenizer import Tokenizer

# Qwen3's ids of the tokens in the fault cases, in the vocabulary's spelling.
CASE_TOKENS = {
    "1": 16,
    "A": 32,
    "J": 41,
    "a": 64,
    "b": 65,
    "x": 87,
    "Ċ": 198,  # line break
    "Ġ": 220,  # blank
    "ĺ": 246,
    "ľ": 250,
    "ĊĊ": 271,
    "ok": 562,
    "DE": 1150,
    "JSON": 5370,
    "FG": 12001,
    "HI": 23913,
    "é¾": 82912,
    "ä¸ĸ": 99244,  # 世
    "ðŁ¦": 123918,  # the first three bytes of 🦜
}
SPECIAL_TOKENS = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}
ADDED_TOKENS = {"<tool_call>": 151657, "</tool_call>": 151658, "<think>": 151667, "</think>": 151668}
_FIRST_FREE_ID = 30000

CHATML_WITH_TOOLS = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {{- message.content }}
    {%- for call in message.tool_calls or [] %}
        {{- '\\n<tool_call>' + call.function.name + ' ' }}{{ call.function.arguments | tojson }}{{ '</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if tools %}{{- tools | tojson }}{%- endif %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""


def case_tokenizer() -> Tokenizer:
    """Byte-level; gives the tokens of the fault cases Qwen3's ids, and all other single bytes free ones."""
    vocab = dict(CASE_TOKENS)
    others = [token for token in sorted(pre_tokenizers.ByteLevel.alphabet()) if token not in vocab]
    vocab |= {token: _FIRST_FREE_ID + i for i, token in enumerate(others)}
    vocab |= SPECIAL_TOKENS | ADDED_TOKENS
    backend = byte_level_backend(vocab)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in ADDED_TOKENS])
    config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": CHATML_WITH_TOOLS}
    return Tokenizer(backend, config=config)


def byte_level_backend(vocab: dict[str, int]) -> Backend:
    """A backend with the given vocabulary and no merges: texts become single bytes."""
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def llama3_like_backend() -> Backend:
    """As Llama 3's tokenizer.json: a post-processor puts <|begin_of_text|> in front."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = byte_level_backend({token: i for i, token in enumerate(alphabet)})
    backend.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    template = processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        pair="<|begin_of_text|> $A <|begin_of_text|> $B",
        special_tokens=[("<|begin_of_text|>", 256)],
    )
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return backend


def sentencepiece_like_tokenizer() -> Tokenizer:
    """As Llama 2's: ▁ for blanks, missing characters as bytes <0xNN>, one leading blank stripped when decoding."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁Hello", "▁world", "!", "a", "▁a", "世"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = Backend(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend, config={"bos_token": "<s>", "eos_token": "</s>"})
