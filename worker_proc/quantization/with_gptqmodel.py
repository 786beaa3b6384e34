"""The package GPTQModel as quantizer, where it is installed (extra `quant`)."""

import torch

from folovllm.common.errors import ConfigError
from folovllm.common.quantize_job import QuantizeJob


def quantize_with_gptqmodel(job: QuantizeJob, device: torch.device) -> None:
    """Quantizes on `device` and writes the checkpoint with GPTQModel. An interrupted call leaves nothing to go on from.

    Raises:
        ConfigError: the package is missing or cannot be imported.
    """
    try:
        from gptqmodel import GPTQModel, QuantizeConfig
    except ImportError as error:
        raise ConfigError(f"GPTQModel cannot be used ({error}): pip install 'folovllm[quant]'") from error
    config = QuantizeConfig(
        bits=job.bits,
        group_size=job.group_size,
        sym=job.sym,
        desc_act=job.desc_act,
        damp_percent=job.damping,
        lm_head=job.head,
        device=device.type,  # left to itself it takes any accelerator that it finds
    )
    model = GPTQModel.load(job.model, config)
    model.quantize([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in job.calibration], batch_size=1)
    model.save(job.out)
