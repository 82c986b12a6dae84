"""Compares what the ranks of a layout computed with what one rank did, tensor by tensor.

Codes, gamma and masks are functions of the weights alone: equal to the bit, or something is wrong. So are quantized
activations, their scales and the hidden states of ternary models without experts (docs/method.md, "Forward"). What
floating sums enter is compared by its largest relative difference.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_sbn.config import Recipe
from megatron_sbn.doctor.logical_tensors import assemble, fingerprint, read_shards, relative

KINDS = ("gamma", "mask", "codes", "x_q", "s_x", "hidden")
_OF_WEIGHTS = ("gamma", "mask", "codes")


@dataclass(frozen=True)
class Trial:
    """A tiny model's steps under one layout: logical tensors of the first, loss and norm of each, bytes of a rank."""

    tensors: Mapping[str, Tensor]
    losses: list[float]
    grad_norms: list[float]
    bytes_by_rank: list[dict[str, float]]  # by rank, then GROUP.KIND
    resumed_losses: list[float] = field(default_factory=list)  # of the steps after a checkpoint, if it went on from one
    resumed_norms: list[float] = field(default_factory=list)

    @property
    def comm_bytes(self) -> dict[str, float]:
        """Bytes of the first step by group and kind, over all ranks."""
        names = sorted({name for rank in self.bytes_by_rank for name in rank})
        return {name: math.fsum(rank.get(name, 0.0) for rank in self.bytes_by_rank) for name in names}


def read_trial(folder: Path, ranks: int) -> Trial:
    """What `ranks` ranks left in a folder. Raises ValueError where replicas differ in a bit."""
    records = [json.loads((folder / f"rank-{rank}.json").read_text(encoding="utf-8")) for rank in range(ranks)]
    tensors = assemble([read_shards(folder / f"rank-{rank}.safetensors") for rank in range(ranks)])
    paths = [folder / f"resumed-{rank}.json" for rank in range(ranks)]
    resumed = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]
    for key in ("losses", "grad_norms"):
        if any(other[key] != numbers[0][key] for numbers in (records, resumed) for other in numbers):
            raise ValueError(f"{key}: ranks do not agree")
    after = resumed[0] if resumed else {"losses": [], "grad_norms": []}
    moved = [rank["bytes"] for rank in records]
    return Trial(tensors, records[0]["losses"], records[0]["grad_norms"], moved, after["losses"], after["grad_norms"])


@dataclass(frozen=True)
class Line:
    """One compared quantity; `limit` is the largest difference that counts as equal, 0 for bits."""

    name: str
    difference: float
    limit: float
    ours: str
    theirs: str

    @property
    def equal(self) -> bool:
        """Whether it is within its limit."""
        return self.difference <= self.limit


def compare(recipe: Recipe, ours: Trial, theirs: Trial) -> list[Line]:
    """Every tensor, the first loss and the first gradient norm of `ours` beside those of a single rank."""
    lines = []
    for name in sorted(ours.tensors.keys() | theirs.tensors.keys()):
        lines.append(_line(recipe, name, ours.tensors.get(name), theirs.tensors.get(name)))
    lines.append(_number("loss", ours.losses[0], theirs.losses[0], 1e-5 if recipe.model.bf16 else 1e-6))
    lines.append(_number("grad norm", ours.grad_norms[0], theirs.grad_norms[0], _norm_limit(recipe)))
    return lines


def is_exact(recipe: Recipe) -> bool:
    """Whether tokens and hidden states are the same bits at any layout."""
    linear = recipe.linear
    return linear.weight_format == "ternary" and linear.activation_bits is not None and not recipe.model.num_moe_experts


def _line(recipe: Recipe, name: str, ours: Tensor | None, theirs: Tensor | None) -> Line:
    if ours is None or theirs is None or ours.shape != theirs.shape:
        return Line(name, math.inf, 0.0, _shape_of(ours), _shape_of(theirs))
    exact = name.rpartition(".")[2] in _OF_WEIGHTS or is_exact(recipe)
    limit = 0.0 if exact else (2e-2 if recipe.model.bf16 else 1e-5)
    return Line(name, largest_difference(ours, theirs), limit, fingerprint(ours), fingerprint(theirs))


def largest_difference(ours: Tensor | None, theirs: Tensor | None) -> float:
    """0 for equal bits, else the largest difference over the largest magnitude; inf where the shapes differ."""
    if ours is None or theirs is None or ours.shape != theirs.shape:
        return math.inf
    if fingerprint(ours) == fingerprint(theirs):
        return 0.0
    difference = relative(ours, theirs)
    return difference if 0 < difference < math.inf else math.inf  # NaN, or bits that no value shows


def fingerprint_of(trial: Trial, kind: str) -> str:
    """sha256 over the fingerprints of all tensors of a kind (KINDS), by name."""
    names = sorted(name for name in trial.tensors if name.rpartition(".")[2] == kind)
    return hashlib.sha256("".join(fingerprint(trial.tensors[name]) for name in names).encode()).hexdigest()


def _shape_of(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"shape {list(tensor.shape)}"


def _number(name: str, ours: float, theirs: float, limit: float) -> Line:
    return Line(name, abs(ours - theirs) / abs(theirs), limit, f"{ours!r}", f"{theirs!r}")


def _norm_limit(recipe: Recipe) -> float:
    """Rows of dY are rounded by a shard's own maximum in the int8 modes; bf16 rounds what each shard sums."""
    if recipe.linear.backward != "exact":
        return 3e-2
    return 5e-3 if recipe.model.bf16 else 1e-5


def worst(lines: list[Line], kind: str) -> Line | None:
    """The line of a kind of tensor (KINDS) that differs most; None where there is none."""
    of_kind = [line for line in lines if line.name.rpartition(".")[2] == kind]
    return max(of_kind, key=lambda line: line.difference, default=None)


def verdict(line: Line | None) -> str:
    """ "equal", or how much it differs."""
    if line is None:
        return "-"
    return "equal" if line.difference == 0 else f"{line.difference:.1e}{'' if line.equal else ' DIFFERS'}"


def as_json(lines: list[Line], ours: Trial) -> dict[str, Any]:
    """For a program: every line, and the bytes."""
    rows = [asdict(line) | {"equal": line.equal} for line in lines]
    return {"equal": all(line.equal for line in lines), "tensors": rows, "bytes": ours.comm_bytes}
