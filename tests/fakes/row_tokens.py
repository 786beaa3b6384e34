"""What rows hold, from plain lists."""

from collections.abc import Sequence

import numpy as np
import torch

from folovllm.worker_proc.sample.constraints import RowTokens


def row_tokens(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], room: int = 3) -> RowTokens:
    """Row r lies in slot 2r + 1; behind its tokens, and in the other slots, lies what must not be looked at."""
    known = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    table = torch.full((2 * len(known) + 1, max(map(len, known)) + room), 1, dtype=torch.int32)
    slots = np.arange(len(known)) * 2 + 1
    for slot, tokens in zip(slots.tolist(), known, strict=True):
        table[slot, : len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
    num_prompt, num_known = np.array([len(each) for each in prompts]), np.array([len(each) for each in known])
    return RowTokens(
        token_ids=table,
        slots=torch.from_numpy(slots.copy()),
        num_prompt=torch.from_numpy(num_prompt.copy()),
        num_known=torch.from_numpy(num_known.copy()),
        host_slots=slots,
        host_num_prompt=num_prompt,
        host_num_known=num_known,
    )
