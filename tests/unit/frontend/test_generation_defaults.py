"""What a model folder's files say, and what of it counts."""

import logging
import pathlib
from typing import Any

import pytest

from folovllm.common.errors import ModelError
from folovllm.common.sampling_params import SamplingParams
from folovllm.frontend.generation_defaults import ModelDefaults, read_model_defaults
from folovllm.frontend.tokenizer import Tokenizer
from tests.fakes.model_folder import END_OF_TEXT, IM_END, write_model_folder


def defaults_of(folder: pathlib.Path, generation_config: dict[str, Any] | None, **config: Any) -> ModelDefaults:
    write_model_folder(folder, generation_config=generation_config, **config)
    return read_model_defaults(folder, Tokenizer.from_folder(folder))


def test_without_a_file_the_defaults_are_neutral(tmp_path: pathlib.Path) -> None:
    defaults = defaults_of(tmp_path, None)
    assert defaults == ModelDefaults(eos_token_ids=(IM_END,))
    neutral = SamplingParams(temperature=1.0, top_k=-1, top_p=1.0, min_p=0.0, repetition_penalty=1.0)
    assert defaults.sampling_params() == neutral


def test_L39_the_files_defaults_count_and_are_logged(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "folovllm"):
        defaults = defaults_of(tmp_path, {"temperature": 0.6, "top_k": 1, "top_p": 0.95})
    assert (defaults.temperature, defaults.top_k, defaults.top_p, defaults.min_p) == (0.6, 1, 0.95, 0.0)
    assert defaults.from_file == ("temperature", "top_k", "top_p")
    assert "generation_config.json: temperature=0.6, top_k=1, top_p=0.95 (explicit values win)" in caplog.text


def test_transformers_top_k_0_means_all(tmp_path: pathlib.Path) -> None:
    assert defaults_of(tmp_path, {"top_k": 0}).top_k == -1


def test_L39_a_repetition_penalty_of_the_file_counts(tmp_path: pathlib.Path) -> None:
    defaults = defaults_of(tmp_path, {"repetition_penalty": 1.05})
    assert (defaults.repetition_penalty, defaults.from_file) == (1.05, ("repetition_penalty",))
    assert defaults.sampling_params().repetition_penalty == 1.05


@pytest.mark.parametrize("name, value", [("temperature", -1), ("top_p", 0), ("repetition_penalty", 0)])
def test_a_default_out_of_range_is_named(tmp_path: pathlib.Path, name: str, value: float) -> None:
    with pytest.raises(ModelError, match=rf"generation_config\.json: {name}="):
        defaults_of(tmp_path, {name: value})


@pytest.mark.parametrize(
    "generation_config, config, ids",
    [
        ({"eos_token_id": [IM_END, END_OF_TEXT]}, {}, (IM_END, END_OF_TEXT)),
        ({"eos_token_id": END_OF_TEXT}, {}, (END_OF_TEXT,)),
        ({}, {"eos_token_id": [7, 8]}, (7, 8)),
        (None, {"eos_token_id": None}, (IM_END,)),  # the tokenizer's
    ],
)
def test_L08_end_of_sequence_ids(
    tmp_path: pathlib.Path, generation_config: dict[str, Any] | None, config: dict[str, Any], ids: tuple[int, ...]
) -> None:
    assert defaults_of(tmp_path, generation_config, **config).eos_token_ids == ids


def test_a_model_without_tokenizer_may_have_no_end(tmp_path: pathlib.Path) -> None:
    write_model_folder(tmp_path, with_tokenizer=False, eos_token_id=None)
    assert read_model_defaults(tmp_path, None).eos_token_ids == ()


def test_a_broken_file_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ModelError, match=r"generation_config\.json"):
        defaults_of(tmp_path, {"temperature": "warm"})
