import pathlib

import msgspec
import pytest

from folovllm.common.errors import ConfigError
from folovllm.common.quantize_job import QuantizeJob, begin_job, read_job, work_folder


def job(out: pathlib.Path, **changes: object) -> QuantizeJob:
    made = QuantizeJob(
        model="/m", out=str(out), calibration=[[1, 2], [3, 4]], evaluation=[[5, 6]], evaluation_name="a text"
    )
    return msgspec.structs.replace(made, **changes)


def test_a_job_is_written_and_read(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "deep" / "out"
    path = begin_job(job(out, bits=8))
    assert path.parent == work_folder(out)
    assert read_job(path) == job(out, bits=8)


def test_the_same_job_is_taken_up_again_and_no_other(tmp_path: pathlib.Path) -> None:
    path = begin_job(job(tmp_path))
    (path.parent / "layer.safetensors").touch()
    assert begin_job(job(tmp_path)) == path
    for changes in ({"group_size": 64}, {"calibration": [[1, 2], [3, 5]]}):
        with pytest.raises(ConfigError, match="unfinished job with other options"):
            begin_job(job(tmp_path, **changes))


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: pathlib.Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(ConfigError, match="not empty: give a new folder"):
        begin_job(job(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_broken_file(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "job.json"
    with pytest.raises(ConfigError, match=r"job\.json"):
        read_job(path)
    path.write_text('{"model": "x"}')
    with pytest.raises(ConfigError, match="missing required field"):
        read_job(path)
