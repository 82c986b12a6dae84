"""The main job: a ternary 6:8 model and its dense BF16 twin on the text of the Python standard library.

Takes the library's sources that are on every machine with Python, trains a tokenizer, writes shards with a held-out
split, trains both models on the same tokens, and ends with a table. Both must beat the unigram perplexity of the
held-out text by `REQUIRED_GAIN`, or the command fails.
"""

import json
import math
import statistics
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from megatron_sbn.config import Recipe, load_recipe
from megatron_sbn.config.validation import validate_world_size
from megatron_sbn.data import corpus
from megatron_sbn.data.data_check import QUICKSTART_DATA
from megatron_sbn.data.manifest import shard_facts
from megatron_sbn.errors import InputError, NumericalError, RecipeError
from megatron_sbn.launch import launch
from megatron_sbn.runs.folder import METRICS, new_folder
from megatron_sbn.text_table import aligned
from megatron_sbn.tracking.destination import destination

RECIPES = Path("recipes")  # found by config/yaml_file.py
MODELS = ("quickstart", "quickstart-dense")
REQUIRED_GAIN = 3.0
CORPUS = Path(QUICKSTART_DATA) / "stdlib"
# The library's own tests are a third of its text and hold files that are not UTF-8 on purpose.
NOT_CORPUS = ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3")


@dataclass(frozen=True)
class Outcome:
    """What the table shows of one run."""

    name: str
    folder: Path
    perplexity: float
    zero_fraction: float
    flip_rate: float | None
    tokens_per_second: float


def run(overrides: list[str], prepare_only: bool = False) -> int:
    """Prepares, trains both, prints the table; status 0 when both are good enough."""
    recipes = [load_recipe(RECIPES / f"{name}.yaml", overrides) for name in MODELS]
    gpus = 0 if recipes[0].device == "cpu" else _gpus()
    if gpus == 1:  # the recipes' two tensor-parallel ranks would have to share it
        overrides = ["parallel.tensor=1", *overrides]
        recipes = [load_recipe(RECIPES / f"{name}.yaml", overrides) for name in MODELS]
    ranks = recipes[0].parallel.tensor * recipes[0].parallel.pipeline
    if recipes[0].device == "cuda" and not gpus:
        raise RecipeError("device = cuda: PyTorch finds no GPU here; set device=cpu, or look at nvidia-smi")
    if gpus and ranks > gpus:
        raise RecipeError(f"the recipes' layout takes {ranks} GPUs, and there are {gpus}; set device=cpu or parallel.*")
    for recipe in recipes:
        validate_world_size(recipe, ranks)
    unigram = _prepare(recipes[0])
    if prepare_only:
        return 0
    print(f"training on {ranks} {'GPU' if gpus else 'CPU'} rank{'s' if ranks > 1 else ''}", flush=True)
    if gpus:
        print("device=cpu (make quickstart DEVICE=cpu) trains on the CPU instead", flush=True)
    outcomes = []
    for name, recipe in zip(MODELS, recipes, strict=True):
        folder = new_folder(recipe.name)
        arguments = [str(RECIPES / f"{name}.yaml"), *overrides, f"run_dir={folder}"]
        status = launch(arguments, ranks)
        if status:
            return status
        outcomes.append(_outcome(recipe, folder))
    print(_table(recipes, outcomes, unigram))
    return _verdict(outcomes, unigram)


def _gpus() -> int:
    """How many GPUs PyTorch finds; it starts none of them."""
    import torch

    return torch.cuda.device_count()


def _prepare(recipe: Recipe) -> float:
    """Writes the shards unless they are there; returns the unigram perplexity of the held-out text.

    Shards of an earlier release have it in a file of its own.
    """
    options = corpus.PrepareOptions(
        inputs=tuple(str(path) for path in _library_sources()),
        output=CORPUS,
        vocab_size=recipe.model.vocab_size,
        validation_fraction=0.05,
        skip_bad=True,
    )
    cache = CORPUS.with_name("unigram.json")
    facts = shard_facts(f"{CORPUS}-validation")
    if corpus.is_prepared(options) and facts is not None:
        if facts.unigram_loss is not None:
            return math.exp(facts.unigram_loss)
        if cache.is_file():
            return float(json.loads(cache.read_text())["perplexity"])
    print(f"preparing {len(options.inputs)} files of the Python standard library (once)", flush=True)
    report = corpus.prepare(options, workers=2)
    assert report.unigram_loss is not None, "a split is asked for"
    perplexity = math.exp(report.unigram_loss)
    print(f"{report.documents:,} documents, {report.tokens:,} tokens, unigram perplexity {perplexity:.1f}", flush=True)
    return perplexity


def _library_sources() -> list[Path]:
    """The standard library's .py files, without its tests and without what was installed into it."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in library.rglob("*.py") if not set(path.relative_to(library).parts) & set(NOT_CORPUS))
    if not files:
        raise InputError(f"{library}: holds no .py files; use a Python with its standard library in source form")
    return files


def _outcome(recipe: Recipe, folder: Path) -> Outcome:
    from megatron_sbn.runs.metrics_file import read_metrics

    metrics = folder / METRICS
    rows = read_metrics(metrics)

    def last(name: str) -> float | None:
        values = [row[name] for row in rows if name in row]
        return values[-1] if values else None

    perplexity, zeros = last("validation_perplexity"), last("zero_fraction")
    if perplexity is None or zeros is None or not math.isfinite(perplexity):
        raise NumericalError(f"{metrics}: holds no finite validation_perplexity and zero_fraction")
    rates = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
    return Outcome(recipe.name, folder, perplexity, zeros, last("flip_rate"), statistics.median(rates))


def _table(recipes: list[Recipe], outcomes: list[Outcome], unigram: float) -> str:
    header = ("model", "validation perplexity", "vs unigram", "zeros", "flip rate", "tokens/s")
    rows = []
    for outcome in outcomes:
        flips = "-" if outcome.flip_rate is None else f"{outcome.flip_rate:.2%}"
        gain = f"{unigram / outcome.perplexity:.1f}x better"
        rate = f"{outcome.tokens_per_second:,.0f}"
        rows.append((outcome.name, f"{outcome.perplexity:.2f}", gain, f"{outcome.zero_fraction:.1%}", flips, rate))
    lines = ["", *aligned(header, rows)]
    lines += ["", f"unigram perplexity of the held-out text: {unigram:.1f}"]
    lines += [f"run folder: {outcome.folder}" for outcome in outcomes]
    place = destination(recipes[0], outcomes[0].folder)
    command = place.open_command.replace("mlflow ", f"{Path(sys.executable).with_name('mlflow')} ", 1)
    return "\n".join([*lines, f"MLflow page: {command}"])


def _verdict(outcomes: list[Outcome], unigram: float) -> int:
    for outcome in outcomes:
        if outcome.perplexity * REQUIRED_GAIN > unigram:
            print(
                f"sbn: {outcome.name}: validation perplexity {outcome.perplexity:.1f} is not {REQUIRED_GAIN:g}x better "
                f"than the unigram perplexity {unigram:.1f}; train longer with training.steps",
                file=sys.stderr,
            )
            return 1
    return 0
