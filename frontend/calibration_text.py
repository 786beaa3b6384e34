"""Text for quantizing: what a model is calibrated on, and what its perplexity is measured on.

Built in is the reference documentation that every Python carries (`pydoc_data.topics`): some 0.5 MB of English with
code, no download. Its last eighth is kept for the measurement and never calibrated on.
"""

import hashlib
import platform
from collections.abc import Sequence

from folovllm.common.errors import ConfigError

_HELD_BACK = 8  # one part in so many


def builtin_text() -> tuple[str, str]:
    """The text to calibrate on, and that to measure on.

    Raises:
        ConfigError: this Python comes without its documentation, as some distributions pack it.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ConfigError("this Python lacks pydoc_data, the built-in text: give --calibration FILE") from error
    text = "\n\n".join(topics[name] for name in sorted(topics))
    border = len(text) - len(text) // _HELD_BACK
    return text[:border], text[border:]


def name_of_builtin(text: str) -> str:
    """What a report calls it: its source and the beginning of its SHA-256."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return f"pydoc_data.topics of Python {platform.python_version()} (the last eighth; SHA-256 {digest})"


def samples(token_ids: Sequence[int], length: int, most: int) -> list[list[int]]:
    """Up to `most` pieces of `length` tokens, spread evenly over the text.

    Raises:
        ConfigError: the text is shorter than one piece.
    """
    count = min(len(token_ids) // length, most)
    if count == 0:
        raise ConfigError(f"the text has {len(token_ids)} tokens, fewer than one sample of {length}")
    spare = len(token_ids) - length
    starts = [spare * index // max(count - 1, 1) for index in range(count)]
    return [list(token_ids[start : start + length]) for start in starts]
