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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 3}, "3 bits are not supported; supported are 4 and 8"),
        ({"group_size": 0}, "group size 0 is not supported; supported are 16 to 1024"),
        ({"group_size": 20}, "20 is no multiple of 8"),
        ({"damping": 0.0}, "damping is 0: it must be a number above 0"),
        ({"damping": float("nan")}, "damping is nan"),
        ({"damping": float("inf")}, "damping is inf"),
        ({"calibration": []}, r"calibration needs samples of one length, but it has lengths \[\]"),
        ({"calibration": [[1, 2], [3, 4, 5]]}, r"has lengths \[2, 3\]"),
        ({"evaluation": [[1]]}, "evaluation has samples of 1 tokens: at least 2"),
        ({"evaluation": [[1, -1]]}, "evaluation holds a token id below 0"),
    ],
)
def test_what_no_quantizer_can_work_with(tmp_path: pathlib.Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        job(tmp_path, **changes)
    path, fields = begin_job(job(tmp_path)), msgspec.to_builtins(job(tmp_path))
    path.write_bytes(msgspec.json.encode(fields | changes))  # nor does a file say so
    with pytest.raises(ConfigError, match=r"job\.json"):
        read_job(path)


def test_a_broken_file(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "job.json"
    with pytest.raises(ConfigError, match=r"job\.json"):
        read_job(path)
    path.write_text('{"model": "x"}')
    with pytest.raises(ConfigError, match="missing required field"):
        read_job(path)
