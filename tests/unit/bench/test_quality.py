import pathlib

import pytest
import torch

from bench.quality import compare, measure, rounded_to_nearest
from folovllm.worker_proc.quantization.config import Scheme
from folovllm.worker_proc.quantize import load_model
from tests.fakes.gptq_models import Format, make_gptq_model

CPU = torch.device("cpu")


@torch.inference_mode()
def test_what_rounding_costs_grows_with_its_coarseness(tmp_path: pathlib.Path) -> None:
    _, plain = make_gptq_model(tmp_path, "llama", Format())
    models = {
        "exact": load_model(plain, CPU),
        "again": load_model(plain, CPU),
        "8 bits": rounded_to_nearest(plain, Scheme(8, 16, sym=False)),
        "4 bits": rounded_to_nearest(plain, Scheme(4, -1, sym=True)),
    }
    sequences = torch.randint(0, 199, (3, 24), generator=torch.Generator().manual_seed(0))
    found = compare(models, sequences)
    assert found["again"] == found["exact"]
    assert found["exact"].greedy_agreement == 1.0 and abs(found["exact"].kl) < 1e-6
    assert 0 < 5 * found["8 bits"].kl < found["4 bits"].kl
    assert found["4 bits"].greedy_agreement <= found["8 bits"].greedy_agreement
    assert all(each.perplexity > 1 for each in found.values())


def test_a_model_that_is_not_quantized(tmp_path: pathlib.Path, demo_model_dir: pathlib.Path) -> None:
    _, plain = make_gptq_model(tmp_path, "llama", Format())
    with pytest.raises(ValueError, match="is not quantized"):
        measure(demo_model_dir, plain, 1)
