"""Progress bars: that of `LLM.generate` (prompts done, and tokens per second both ways), and a plain one."""

import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

from folovllm.frontend.outputs import RequestOutput

if TYPE_CHECKING:
    from tqdm import tqdm


def _bar(total: int | None, *, shown: bool, unit: str, desc: str | None = None) -> "tqdm[NoReturn] | None":
    """tqdm's bar, None if it is not to be shown: the import's 25 ms would be most of what it costs."""
    if not shown:
        return None
    from tqdm import tqdm

    return tqdm(total=total, desc=desc, unit=unit, dynamic_ncols=True)


class Progress:
    """A context manager; switched off, it does nothing and costs nothing."""

    def __init__(self, total: int, shown: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._start = clock()
        self._tokens_in = 0
        self._tokens_out = 0
        self._bar = _bar(total, shown=shown, unit="prompt", desc="Prompts")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, output: RequestOutput) -> None:
        """Counts a finished request."""
        self._tokens_in += len(output.prompt_token_ids)
        self._tokens_out += sum(len(answer.token_ids) for answer in output.outputs)
        if self._bar is not None:
            self._bar.set_postfix_str(self.rates(), refresh=False)
            self._bar.update(1)

    def rates(self) -> str:
        seconds = max(self._clock() - self._start, 1e-6)
        return f"input {self._tokens_in / seconds:.1f} tokens/s, output {self._tokens_out / seconds:.1f} tokens/s"


class Bar:
    """A bar that counts; a context manager. Switched off, it does nothing."""

    def __init__(self, total: int | None, *, shown: bool, unit: str) -> None:
        """Args:
        total: None where nobody knows.
        shown: False draws nothing.
        unit: what is counted.
        """
        self._bar = _bar(total, shown=shown, unit=unit)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self) -> None:
        """One more."""
        if self._bar is not None:
            self._bar.update(1)
