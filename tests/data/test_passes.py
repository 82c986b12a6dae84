"""How often data is read: counted against the samples that a run takes, said at the start and by `sbn plan`."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_sbn.cli import main
from megatron_sbn.config import Recipe, load_recipe
from megatron_sbn.data.dataset import BlendedDataset, build_dataset
from megatron_sbn.data.passes import data_lines, training_passes
from megatron_sbn.data.shards import ShardWriter

RECIPE = """name: a
model: {num_layers: 1, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 2, seq_length: 16, vocab_size: 340}
training: {steps: 30, global_batch_size: 4, micro_batch_size: 2}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, tokens in (("a", 16 * 20 + 1), ("b", 16 * 100 + 9)):
        writer = ShardWriter(Path(f"{name}.bin"), Path(f"{name}.idx"), 340)
        writer.add(np.zeros(tokens, dtype=np.int64))
        writer.finish()
    return tmp_path


def recipe(data: str, *overrides: str) -> Recipe:
    Path("a.yaml").write_text(f"{RECIPE}data: {{train: {data}}}\n")
    return load_recipe("a.yaml", overrides)


def test_passes_are_those_of_the_samples_that_are_taken(here: Path) -> None:
    made = recipe("[{path: a, weight: 3}, b]")
    dataset = build_dataset([(shard.path, shard.weight) for shard in made.data.train], 16, 0)
    assert isinstance(dataset, BlendedDataset)
    uses = np.bincount([dataset.place(index)[0] for index in range(120)])
    expected = [uses[0] / 20, uses[1] / 100]
    assert [one.passes for one in training_passes(made)] == pytest.approx(expected, abs=0.02)
    assert [(one.path, one.tokens, one.share) for one in training_passes(made)] == [("a", 321, 0.75), ("b", 1609, 0.25)]


def test_lines(here: Path) -> None:
    assert data_lines(recipe("b")) == ["b: 1,609 tokens, 1.20 passes"]
    assert data_lines(recipe("[{path: a, weight: 3}, b]")) == [
        "1,930 tokens in 2 shards, 0.30 to 4.50 passes",
        "a: 321 tokens, 75.0% of the samples, 4.50 passes",
        "b: 1,609 tokens, 25.0% of the samples, 0.30 passes",
        "warning: a: more than 4 passes, from where on repeated text adds less and less; give more text, "
        "another weight or fewer steps",
    ]
    assert data_lines(recipe("none")) == ["not known: none: cannot read the token shard: No such file or directory"]


def test_of_many_shards_those_read_most_often_are_named(here: Path) -> None:
    for number in range(9):
        for suffix in ("bin", "idx"):
            Path(f"s{number}.{suffix}").symlink_to(f"b.{suffix}")
    shards = ", ".join(f"{{path: s{number}, weight: {number + 1}}}" for number in range(9))
    lines = data_lines(recipe(f"[{shards}]", "training.steps=9000"))
    assert lines[0] == "14.48k tokens in 9 shards, 8.00 to 72 passes"
    assert [line.split(":")[0] for line in lines[1:4]] == ["s8", "s7", "s6"]
    assert lines[4] == "and 6 shards that are read less often"
    assert lines[5].startswith("warning: s8 and 8 more: more than 4 passes")


def test_plan_says_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe("b")
    assert main(["plan", "a.yaml", "--nodes", "1", "--gpus-per-node", "1", "--device", "h100"]) == 0
    assert capsys.readouterr().out.endswith("\nData\n  b: 1,609 tokens, 1.20 passes\n")


def test_no_torch(here: Path) -> None:
    recipe("b")
    script = (
        "import sys; from megatron_sbn.config import load_recipe; from megatron_sbn.data.passes import data_lines\n"
        "data_lines(load_recipe('a.yaml'))\nassert not {'torch', 'megatron', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
