"""Run folders in which something is not as the run left it, for every command that reads one."""

import json
import shutil
from pathlib import Path

from bad_json import changed_text, damaged
from bad_recipes import changed_recipe
from bad_values import Draw, flipped, odd_output
from good_input import good_input
from sandbox import SECRET, Case

LATEST = (
    *(
        "",
        "\n",
        "step-00000001",
        "step-00000009",
        "step-1",
        "step--1",
        "step-9" + "9" * 30,
        "step-" + "9" * 5000,
        "latest",
    ),
    *(
        "../../../beside",
        "../run",
        "/etc",
        ".",
        "..",
        "step-00000002/../step-00000001",
        "step-\u0663",
        "step-00000002\0",
        "~",
    ),
)


def run_case(draw: Draw, folder: Path) -> Case:
    """One or two runs of a study, one of them changed; compared, reported, delivered, submitted or continued."""
    study = folder / "study"
    for name in ("run", "other")[: draw.choice((1, 2))]:
        shutil.copytree(good_input(folder) / "study" / "run", study / name)
    run = study / draw.choice([path.name for path in sorted(study.iterdir())])
    for _ in range(draw.choice((1, 1, 2))):
        draw.choices((_metrics, _recipe, _record, _status, _attempts, _latest, _any), (8, 4, 6, 4, 2, 3, 2))[0](
            draw, run
        )
    runs = [str(path) for path in sorted(study.iterdir())]
    here = f"run_dir={run}"
    good = str(good_input(folder) / "recipe.yaml")
    page = ["--output", odd_output(draw, folder)]
    words = draw.choice(
        (
            ["compare", *runs],
            ["compare", *runs],
            ["report", str(study)],
            ["report", str(study), *page],
            ["checkpoint", "show", str(run)],
            ["submit", good, "tracking.uri=~", here, "--dry-run"],
            ["begin", good, here],
            ["end", good, here],
            ["end", good, here, "--srun-status", "1", "--asked", "TERM"],
        )
    )
    return Case("run", "job" if words[0] in ("begin", "end") else "cli", tuple(words))


def delivery_case(draw: Draw, folder: Path) -> Case:
    """A run folder to be delivered to an MLflow that is good, away, or no MLflow."""
    run = folder / "run"
    shutil.copytree(good_input(folder) / "study" / "run", run)
    database = folder / "mlflow.db"
    shutil.copy(good_input(folder) / "empty.db", database)
    record = json.loads((run / "tracking.json").read_text())
    record["uri"] = f"sqlite:///{database}"
    record["artifacts"] = [str(run / "recipe.yaml")]
    (run / "tracking.json").write_text(json.dumps(record))
    for _ in range(draw.choice((1, 1, 2))):
        draw.choices((_metrics, _record, _any), (4, 6, 1))[0](draw, run)
    if draw.random() < 0.15:
        database.write_bytes(draw.choice((b"", b"garbage" * 100, flipped(draw, database.read_bytes(), 300))))
    uri = draw.choice(
        ([], [], ["--uri", f"sqlite:///{database}"], ["--uri", "http://127.0.0.1:9"], ["--uri", "x"], ["--uri", ""])
    )
    return Case("delivery", "cli", ("sync", str(run), *uri))


def _metrics(draw: Draw, run: Path) -> None:
    """Lines that are changed, doubled, missing, in another order, or no JSON."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        return
    lines = path.read_text(errors="replace").splitlines() or ["{}"]
    for _ in range(draw.choice((1, 1, 3, 10))):
        at = draw.randrange(len(lines))
        kind = draw.choice(("changed", "changed", "changed", "cut", "twice", "gone", "swapped", "garbage"))
        if kind == "changed":
            lines[at] = _changed_line(draw, lines[at])
        elif kind == "cut":
            lines[at] = lines[at][: draw.randrange(len(lines[at]) + 1)]
        elif kind == "twice":
            lines.insert(at, lines[at])
        elif kind == "gone" and len(lines) > 1:
            del lines[at]
        elif kind == "swapped":
            lines[at], lines[0] = lines[0], lines[at]
        else:
            lines.insert(at, draw.choice(("", "[]", "{}", "null", "\x1b[2J", "\x85", '{"step": 1}', "\u2028")))
    path.write_text("\n".join(lines) + draw.choice(("\n", "")), encoding="utf-8", errors="surrogatepass")


def _changed_line(draw: Draw, line: str) -> str:
    try:
        return changed_text(draw, json.loads(line))
    except (ValueError, RecursionError):  # changed before
        return line


def _recipe(draw: Draw, run: Path) -> None:
    if (run / "recipe.yaml").is_file():
        changed_recipe(draw, run)


def _record(draw: Draw, run: Path) -> None:
    _change(draw, run / "tracking.json")
    if draw.random() < 0.1 and (run / "tracking.json").is_file():
        text = (run / "tracking.json").read_text(encoding="utf-8", errors="replace")
        (run / "tracking.json").write_text(text.replace("sqlite:///", f"http://someone:{SECRET}@127.0.0.1:9/"))


def _status(draw: Draw, run: Path) -> None:
    _change(draw, run / "status.json")


def _attempts(draw: Draw, run: Path) -> None:
    attempt = {
        "job": "12", "restart": 0, "state": "FAILED", "exit_status": 1, "checkpoint": 2, "reason": "x", "time": 1.0,
    }  # fmt: skip
    lines = [changed_text(draw, attempt) for _ in range(draw.randint(1, 3))]
    (run / "attempts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogatepass")


def _latest(draw: Draw, run: Path) -> None:
    path = run / "checkpoints" / "latest"
    if draw.random() < 0.3 and path.is_file():
        damaged(draw, path)
    elif not path.is_dir():
        path.unlink(missing_ok=True)
        path.write_text(draw.choice(LATEST))


def _any(draw: Draw, run: Path) -> None:
    """A file that is damaged."""
    damaged(draw, draw.choice(sorted(path for path in run.glob("*") if path.is_file())))


def _change(draw: Draw, path: Path) -> None:
    """Another value somewhere in a JSON file."""
    if not path.is_file():
        return
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError):  # changed before
        return
    path.write_text(changed_text(draw, values), encoding="utf-8", errors="surrogatepass")
