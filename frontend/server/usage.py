"""Counts a request's tokens as its outputs pass by."""

from folovllm.frontend.outputs import RequestOutput
from folovllm.frontend.server.protocol.common import CompletionTokensDetails, PromptTokensDetails, Usage


class UsageCount:
    """Prompts once, answers summed up.

    Attributes:
        completion_tokens: of all answers so far.
        reasoning_tokens: of these, those of reasoning; whoever parses it counts them.
    """

    def __init__(self) -> None:
        self.completion_tokens = 0
        self.reasoning_tokens = 0
        self._prompt_tokens: dict[int, int] = {}
        self._cached_tokens: dict[int, int] = {}

    def add(self, output: RequestOutput, place: int = 0) -> None:
        """One output of the job at `place`, with what is new."""
        self._prompt_tokens[place] = len(output.prompt_token_ids)
        self._cached_tokens[place] = output.num_cached_tokens or 0
        for part in output.outputs:
            self.completion_tokens += len(part.token_ids)

    @property
    def prompt_tokens(self) -> int:
        return sum(self._prompt_tokens.values())

    @property
    def cached_tokens(self) -> int:
        return sum(self._cached_tokens.values())

    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            total_tokens=self.prompt_tokens + self.completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=self.cached_tokens),
            completion_tokens_details=(
                CompletionTokensDetails(reasoning_tokens=self.reasoning_tokens) if self.reasoning_tokens else None
            ),
        )
