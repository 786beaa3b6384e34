"""What a test draws at random does not depend on which tests ran before it in this process."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)
