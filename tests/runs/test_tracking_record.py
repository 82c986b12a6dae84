"""tracking.json: its fields' types, and which files it may name."""

import json
from pathlib import Path

import pytest

from megatron_sbn.errors import InputError
from megatron_sbn.runs.tracking_record import RunRecord, artifact_files, read_record

GOOD = {
    "key": "k", "name": "run", "experiment": "e", "uri": "sqlite:///x.db", "started": 1, "params": {"a": "1"},
    "tags": {"ranks": "2"}, "artifacts": ["a.yaml"], "status": "RUNNING", "ended": None, "run_id": None,
    "delivered_step": 3,
}  # fmt: skip


def test_a_record_is_read(tmp_path: Path) -> None:
    path = tmp_path / "tracking.json"
    path.write_text(json.dumps(GOOD))
    record = read_record(path)
    assert (record.started, record.tags, record.delivered_step, record.run_id) == (1.0, {"ranks": "2"}, 3, None)


def test_what_somebody_wrote_into_it_is_masked(tmp_path: Path) -> None:
    path = tmp_path / "tracking.json"
    path.write_text(
        json.dumps(GOOD | {"params": {"uri": "http://me:hush@host"}, "tags": {"command": "x --token=hush"}})
    )
    record = read_record(path)
    assert (record.params, record.tags) == ({"uri": "http://***@host"}, {"command": "x --token=***"})


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("started", '"now"', "started = 'now'"),
        ("started", "1e999", "started = inf"),
        ("ended", "9" * 400, "ended = 9999"),
        ("started", "-1", "started = -1"),
        ("tags", '{"ranks": 2}', "tags.ranks = 2"),
        ("params", '{"a": null}', "params.a = None"),
        ("artifacts", "[5]", "artifacts.0 = 5"),
        ("status", '"../FINISHED"', "status = '../FINISHED'"),
        ("delivered_step", "true", "delivered_step = True"),
        ("run_id", "[" * 3000, "recursion"),
        ("name", '"a\\nb", "x": 1', "its fields are"),
    ],
)
def test_a_field_of_another_type_is_named(field: str, value: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "tracking.json"
    path.write_text(json.dumps(GOOD | {field: "HERE"}).replace('"HERE"', value))
    with pytest.raises(InputError) as error:
        read_record(path)
    assert expected in str(error.value)
    assert str(error.value).startswith(f"{path}: ")


def test_artifacts_are_files_of_the_run_or_its_study_wherever_they_are_now(tmp_path: Path) -> None:
    run = tmp_path / "study" / "run"
    run.mkdir(parents=True)
    for path in (run / "recipe.yaml", tmp_path / "study" / "a.sbatch", tmp_path / "secret.txt"):
        path.write_text("x")
    (run / "link.txt").symlink_to(tmp_path / "secret.txt")
    texts = [
        f"{run}/recipe.yaml", "/on/another/machine/recipe.yaml", f"{run}/../a.sbatch", f"{tmp_path}/secret.txt",
        "/etc/passwd", f"{run}/link.txt", "", "\0",
    ]  # fmt: skip
    record = RunRecord("k", "run", "e", "x", 1.0, {}, {}, texts)
    found = artifact_files(record, run)
    assert [path.resolve() for path in found] == [
        run / "recipe.yaml",
        run / "recipe.yaml",
        tmp_path / "study" / "a.sbatch",
    ]
