"""Words of the command line in any order, for any command."""

from pathlib import Path

import yaml
from bad_values import Draw, good_values, write
from sandbox import Case

ARGUMENTS = (
    *(
        "",
        "-",
        "--",
        "---",
        "-h",
        "--help",
        "--version",
        "\0",
        "\n",
        "x",
        "x=y",
        "-1",
        "0",
        "1",
        "2",
        "9" * 30,
        "1e400",
        "nan",
        "inf",
    ),
    *(
        "\ud7ff",
        "\udcff",
        "\x1b[2J",
        "*",
        "**",
        "[",
        "/dev/null",
        "/dev/full",
        "/",
        ".",
        "..",
        "~",
        "a" * 5000,
        "h100",
        "int8_gemm=0.5",
    ),
    *(
        "int8_gemm=nan",
        "int8_gemm=",
        "=1",
        "link=9e999",
        "00:10:00",
        "99999999999",
        "1-0:0:0",
        "%s",
        "{}",
        "'",
        '"',
        ";touch x",
    ),
)
OPTIONS = {
    "train": ("--nproc-per-node",),
    "doctor": ("--json", "--steps"),
    "plan": ("--nodes", "--device", "--gpus-per-node", "--assume", "--json"),
    "sweep": (
        "list",
        "--output",
        "--number",
        "--all",
        "--dry-run",
        "--folder",
        "--nproc-per-node",
        "--at-most",
        "--time",
    ),
    "submit": ("--nodes", "--nproc-per-node", "--time"),
    "status": (),
    "logs": (),
    "cancel": (),
    "sync": ("--uri",),
    "compare": (),
    "report": ("--uri", "--output"),
    "prepare": (
        "--input",
        "--output",
        "--tokenizer",
        "--vocab-size",
        "--text-field",
        "--validation-fraction",
        "--seed",
        "--skip-bad",
    ),
    "no-such-command": ("--x",),
}


def argument_case(draw: Draw, folder: Path) -> Case:
    """Words in any order for any command."""
    good = write(folder / "good.yaml", yaml.safe_dump(good_values(draw), sort_keys=False))
    command = draw.choice(list(OPTIONS))
    words = [command, good] if draw.random() < 0.7 else [command]
    if command == "plan" and draw.random() < 0.8:
        words += ["--nodes", "1", "--device", "h100"]
    for _ in range(draw.randint(0, 5)):
        if OPTIONS[command] and draw.random() < 0.6:
            words.append(draw.choice(OPTIONS[command]))
        words.append(draw.choice(ARGUMENTS))
    if command == "submit":
        words.append("--dry-run")
    if command == "prepare":
        words += ["--workers", "1"]
    return Case("arguments", "cli", tuple(words), alone=command != "train")
