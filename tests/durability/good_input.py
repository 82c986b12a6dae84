"""What bad input is made from: a corpus with its tokenizer, a database, and a run that has trained, all good.

good/  text*.txt  corpus-train, corpus-validation (.bin, .idx)  corpus.model, .json  recipe.yaml  empty.db, mlflow.db
       study/run/   recipe.yaml metrics.jsonl tracking.json status.json checkpoints/step-N (three) ...
"""

import os
import shutil
import sys
from pathlib import Path

from sandbox import SECRET

SEQUENCE, VOCABULARY = 16, 320


def good_input(case: Path) -> Path:
    """Where it is, from a case's folder of files."""
    return case.parents[1] / "good"


def make_good_input(folder: Path) -> None:
    """Makes everything, in a fork of this process, which stays without threads and groups."""
    folder.mkdir(parents=True)
    pid = os.fork()
    if pid == 0:
        os._exit(_make(folder))
    _, state = os.waitpid(pid, 0)
    if state:
        raise RuntimeError(f"the good input could not be made:\n{(folder / 'output.txt').read_text()}")


def recipe_text(folder: Path, data: str, more: str = "") -> str:
    """A recipe that trains two steps in a moment, on one rank."""
    return f"""name: good
model: {{num_layers: 1, hidden_size: 16, ffn_hidden_size: 32, num_attention_heads: 2, seq_length: {SEQUENCE},
  vocab_size: {VOCABULARY}, bf16: false}}
linear: {{sparsity: "2:4", mask_interval: 2}}
data: {{train: {data}, validation: {folder}/corpus-validation}}
training: {{steps: 3, global_batch_size: 2, micro_batch_size: 2, validation_interval: 3, validation_samples: 2,
  telemetry_interval: 1}}
checkpoint: {{interval: 1, keep: 3, asynchronous: false}}
{more}
"""


def _make(folder: Path) -> int:
    from megatron_sbn import cli, train
    from megatron_sbn.tracking.sqlite_file import ensure_tables

    quiet = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    words = "the cat sat on the mat and looked at 42 birds".split()
    text = "\n".join(" ".join(words[(i * j) % len(words)] for j in range(40)) for i in range(200))
    (folder / "text.txt").write_text(text)
    for number in range(8):
        (folder / f"text-{number}.txt").write_text(f"{number} {text[number * 300 :]}")
    status = cli.main(
        ["prepare", "--input", f"{folder}/text*.txt", "--output", f"{folder}/corpus", "--vocab-size", str(VOCABULARY),
         "--validation-fraction", "0.3", "--workers", "1"]
    )  # fmt: skip
    from mlflow import MlflowClient

    ensure_tables(folder / "empty.db", lambda uri: MlflowClient(uri).search_experiments())
    shutil.copy(folder / "empty.db", folder / "mlflow.db")
    tracking = f'tracking: {{uri: "sqlite:///{folder}/mlflow.db?password={SECRET}", study: study}}'
    (folder / "recipe.yaml").write_text(recipe_text(folder, f"{folder}/corpus-train", tracking))
    status = status or train.main([str(folder / "recipe.yaml"), f"run_dir={folder}/study/run"])
    sys.stdout.flush()
    return status
