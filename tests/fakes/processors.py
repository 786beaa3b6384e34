"""Logits processors for tests of whole processes."""

import os
from typing import Any

import torch


def only(logits: torch.Tensor, token_ids: torch.Tensor, num_prompt_tokens: int, argument: Any) -> torch.Tensor:
    """Forbids all but the tokens in `argument`, one after another by the length of the answer."""
    chosen = argument[(len(token_ids) - num_prompt_tokens) % len(argument)]
    forbidden = torch.full_like(logits, -torch.inf)
    forbidden[chosen] = logits[chosen]
    return forbidden


def fail(logits: torch.Tensor, token_ids: torch.Tensor, num_prompt_tokens: int, argument: Any) -> torch.Tensor:
    """Fails once the answer has `argument` tokens."""
    if len(token_ids) - num_prompt_tokens >= argument:
        raise RuntimeError("told to")
    return logits


def end_worker(logits: torch.Tensor, token_ids: torch.Tensor, num_prompt_tokens: int, argument: Any) -> torch.Tensor:
    """Ends the whole worker process, without a word, once the answer has `argument` tokens."""
    if len(token_ids) - num_prompt_tokens >= argument:
        os._exit(77)
    return logits
