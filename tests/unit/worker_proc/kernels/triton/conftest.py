import pytest
import torch

from tests.fakes.triton_device import triton_device


@pytest.fixture
def device() -> torch.device:
    """Where the kernels run; skips the test where they cannot."""
    return triton_device()
