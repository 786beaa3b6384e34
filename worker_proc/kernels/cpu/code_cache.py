"""Compiled machine code on disk, so that the second start compiles nothing.

A file's name is a hash of everything the code was made from: the kernel's text, the processor with its features, and
the versions of the compiler. A file begins with a hash of what follows. One that does not fit, whatever has damaged it,
counts as missing and is written anew: code that is not what it should be would end the process.
"""

import hashlib
import os
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Final

from folovllm.common.log import get_logger

_MAGIC: Final = b"folovllm kernel 1\n"
_DIGEST_BYTES: Final = 32

logger = get_logger(__name__)


class CodeCache:
    """Object files in `folder`, which is made when the first one is kept."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder

    def find(self, made_for: Sequence[str]) -> bytes | None:
        """The code that was kept for these texts; None if there is none, or it is damaged."""
        path = self._path(made_for)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            logger.warning("compiled kernels cannot be read: %s", error)
            return None
        head, code = content[: len(_MAGIC) + _DIGEST_BYTES], content[len(_MAGIC) + _DIGEST_BYTES :]
        if head != _MAGIC + hashlib.sha256(code).digest():
            logger.warning("%s is damaged and is made again", path)
            return None
        return code

    def keep(self, made_for: Sequence[str], code: bytes) -> None:
        """Writes the code beside its name and renames it: a reader sees all of it or none."""
        path = self._path(made_for)
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._write(path, _MAGIC + hashlib.sha256(code).digest() + code)
        except OSError as error:  # a full or read-only disk: the code is compiled again next time
            logger.warning("compiled kernels cannot be kept: %s", error)

    def _write(self, path: pathlib.Path, content: bytes) -> None:
        handle, name = tempfile.mkstemp(dir=self._folder, prefix=".new-")
        try:
            with open(handle, "wb") as file:
                file.write(content)
            os.replace(name, path)
        except OSError:  # what could not be written must not fill the disk further
            os.unlink(name)
            raise

    def _path(self, made_for: Sequence[str]) -> pathlib.Path:
        name = hashlib.sha256()
        for text in made_for:
            name.update(hashlib.sha256(text.encode()).digest())
        return self._folder / f"{name.hexdigest()[:40]}.o"
