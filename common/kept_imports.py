"""Imports of modules that a process keeps until it ends, without the garbage collector between them.

An import makes many objects, and all of them stay: a collection that goes through them finds nothing. `import torch`
took 1.40 s with collections and 1.09 s without (Xeon, files in the page cache).
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def kept_imports() -> Iterator[None]:
    """No collections inside the block; after it, none goes through what is there by then."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
