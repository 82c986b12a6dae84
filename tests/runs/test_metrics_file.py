"""metrics.jsonl: strict JSON, whole lines only, truncation at resume."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
from time_limit import LIMIT_SECONDS

from megatron_sbn.errors import InputError
from megatron_sbn.runs.metrics_file import MetricsFile, read_metrics, read_new


def strict(text):
    def refuse(constant):
        raise AssertionError(f"not JSON: {constant}")

    return json.loads(text, parse_constant=refuse)


def test_one_flushed_object_a_line(tmp_path):
    path = tmp_path / "new" / "folder" / "metrics.jsonl"
    file = MetricsFile(path)
    before = time.time()
    file.append(1, {"loss": 0.1, "lr": 3})
    file.append(1, {"validation_loss": 5e-324})
    lines = [strict(line) for line in path.read_text().splitlines()]  # the writer is still open
    assert [(line["step"], line.get("loss"), line.get("validation_loss")) for line in lines] == [
        (1, 0.1, None),
        (1, None, 5e-324),
    ]
    assert all(before - 0.001 <= line["time"] <= time.time() + 0.001 for line in lines)
    assert read_metrics(path)[0] == {"step": 1, "time": lines[0]["time"], "loss": 0.1, "lr": 3.0}


def test_non_finite_values_are_strict_json_and_come_back(tmp_path):
    file = MetricsFile(tmp_path / "m.jsonl")
    file.append(2, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": -0.0})
    assert strict(file.path.read_text())["a"] == "NaN"
    (line,) = read_metrics(file.path)
    assert math.isnan(line["a"])
    assert (line["b"], line["c"], math.copysign(1, line["d"])) == (math.inf, -math.inf, -1)


def test_reserved_names_are_refused(tmp_path):
    file = MetricsFile(tmp_path / "m.jsonl")
    with pytest.raises(ValueError, match="'step'"):
        file.append(1, {"step": 2.0})
    assert read_metrics(file.path) == []


def test_truncate_after_drops_later_steps_and_a_torn_line_and_goes_on(tmp_path):
    path = tmp_path / "m.jsonl"
    file = MetricsFile(path)
    for step in (1, 2, 3):
        file.append(step, {"loss": float(step)})
        file.append(step, {"validation_loss": float(step)})
    kept = path.read_bytes().splitlines(keepends=True)[:4]
    with path.open("ab") as raw:
        raw.write(b'{"step": 2, "ti')
    file.truncate_after(2)
    assert path.read_bytes() == b"".join(kept)
    file.append(3, {"loss": 9.0})
    assert [line["step"] for line in read_metrics(path)] == [1, 1, 2, 2, 3]
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.jsonl"]


def test_opening_after_a_kill_drops_the_torn_line(tmp_path):
    path = tmp_path / "m.jsonl"
    MetricsFile(path).append(1, {"loss": 1.0})
    with path.open("ab") as raw:
        raw.write(b'{"step": 2')
    assert [line["step"] for line in read_metrics(path)] == [1]
    MetricsFile(path).append(2, {"loss": 2.0})
    assert [line["loss"] for line in read_metrics(path)] == [1.0, 2.0]


def test_a_killed_writer_leaves_whole_lines(tmp_path):
    path = tmp_path / "m.jsonl"
    code = (
        "import pathlib, sys\nfrom megatron_sbn.runs.metrics_file import MetricsFile\n"
        "file, step = MetricsFile(pathlib.Path(sys.argv[1])), 0\n"
        "while True:\n    step += 1\n    file.append(step, {'loss': 1 / step})\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)])
    deadline = time.monotonic() + LIMIT_SECONDS
    while not (path.exists() and path.stat().st_size > 20_000):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    lines = read_metrics(path)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert all(line["loss"] == 1 / line["step"] for line in lines)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("nonsense", "not a JSON object"),
        ("[1]", "not a JSON object"),
        ('{"step": 1, "time": 1.0, "loss": NaN}', "not a JSON object"),
        ('{"time": 1.0}', "step is None"),
        ('{"step": true, "time": 1.0}', "step is True"),
        ('{"step": 1.5, "time": 1.0}', "step is 1.5"),
        ('{"step": 1, "time": "now"}', "time is 'now'"),
        ('{"step": -1, "time": 1}', "step is -1"),
        ('{"step": ' + "9" * 400 + ', "time": 1}', "step is 999"),
        ('{"step": 1, "time": 1e999}', "time is inf"),
        ('{"step": 1, "time": -1}', "time is -1"),
        ('{"step": 1, "time": 1, "loss": "low"}', "loss is 'low'"),
        ('{"step": 1, "time": 1, "loss": null}', "loss is None"),
        ('{"step": 1, "time": 1, "loss": true}', "loss is True"),
    ],
)
def test_broken_lines_are_named(tmp_path, bad, message):
    path = tmp_path / "m.jsonl"
    good = '{"step": 1, "time": 1}\n'
    path.write_text(good + bad + "\n" + good)
    with pytest.raises(InputError, match=r"m\.jsonl:2: .*" + message.replace("[", r"\[")):
        read_metrics(path)
    with pytest.raises(InputError, match=r"m\.jsonl:2: "):
        read_new(path, len(good))
    before = path.read_bytes()
    with pytest.raises(InputError):
        MetricsFile(path).truncate_after(1)
    assert path.read_bytes() == before


def test_a_number_that_no_float_holds_is_infinite(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1, "time": 1, "loss": ' + "9" * 400 + ', "x": -' + "9" * 400 + "}\n")
    assert read_metrics(path) == [{"step": 1, "time": 1, "loss": math.inf, "x": -math.inf}]


def test_missing_file_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        read_metrics(tmp_path / "m.jsonl")


def test_read_new_follows_a_growing_file(tmp_path):
    path = tmp_path / "m.jsonl"
    file = MetricsFile(path)
    file.append(1, {"loss": 1.0})
    lines, offset = read_new(path, 0)
    assert [line["step"] for line in lines] == [1]
    with path.open("ab") as raw:
        raw.write(b'{"step": 2, "time": 0')
        raw.flush()
        assert read_new(path, offset) == ([], offset)
        raw.write(b"}\n")
    lines, end = read_new(path, offset)
    assert (lines, end) == ([{"step": 2, "time": 0}], path.stat().st_size)
