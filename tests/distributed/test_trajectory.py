"""From equal weights, every layout makes the same step: fifty steps along a single rank's trajectory.

fp32: loss, gradient norm, every gradient and the updated weights agree to 1e-5 (relative; the weights by norm: where a
gradient is nearly zero, Adam's first steps turn a difference in its last bits into one of the size of lr).
bf16: the hidden states are the same bits, but backward rounds to bf16 what each shard sums: 2^-8 for each rounding.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
from cases import cases
from ranks import run_ranks
from training_runs import run_of
from trajectory import Offset, follow, largest, lead

STEPS = 50
TENSOR2, PIPELINE2 = "parallel.tensor=2", "parallel.pipeline=2"
ZERO2, ZERO3 = "parallel.zero_stage=2", "parallel.zero_stage=3"
TIED = "model.share_embeddings_and_output_weights=true"
SMALL = ("model.num_layers=2", "model.seq_length=16", f"training.steps={STEPS}")
DENSE = ("linear.weight_format=dense", "linear.sparsity=8:8")
LAYOUTS = {
    "tensor2": (2, (TENSOR2,)),
    "pipeline2": (2, (PIPELINE2,)),
    "data2-zero1": (2, ()),
    "data2-zero2": (2, (ZERO2,)),
    "data2-zero3": (2, (ZERO3,)),
    "tensor2-pipeline2": (4, (TENSOR2, PIPELINE2)),
    "pipeline2-data2-zero2": (4, (PIPELINE2, ZERO2)),
    "tensor2-data2-zero3": (4, (TENSOR2, ZERO3)),
    "pipeline2-tied": (2, (PIPELINE2, TIED)),
    "data2-zero3-tied": (2, (ZERO3, TIED)),
    "data2-zero2-offload": (2, (ZERO2, "optimizer.cpu_offload=true")),
}


Leader = Callable[[tuple[str, ...]], Path]


@pytest.fixture(scope="module")
def leader_of(tmp_path_factory: pytest.TempPathFactory) -> Leader:
    """The folder of the single-rank trajectory of some overrides, made once."""

    @functools.cache
    def made(overrides: tuple[str, ...]) -> Path:
        folder = tmp_path_factory.mktemp("trajectory")
        run_ranks(lead, 1, (*SMALL, *overrides), folder, STEPS)
        return folder

    return made


def followed(leader_of: Leader, layout: str, *more: str) -> Offset:
    world_size, overrides = LAYOUTS[layout]
    leader = leader_of(tuple(o for o in (*overrides, *more) if o.startswith("model.")))
    return largest(run_ranks(follow, world_size, (*SMALL, *overrides, *more), leader, STEPS))


# Other layouts' first steps, gradients and updates are in test_layouts.py and test_optimizer_step.py.
@pytest.mark.parametrize("layout", cases(LAYOUTS, ["pipeline2-data2-zero2"]))
def test_every_step_is_the_single_ranks(leader_of: Leader, layout: str) -> None:
    worst = followed(leader_of, layout)
    assert worst.loss < 1e-6
    assert worst.grad_norm < 1e-5
    assert worst.gradient < 1e-5
    assert worst.weights < 1e-5


@pytest.mark.slow
def test_every_step_in_bf16_is_close(leader_of: Leader) -> None:
    worst = followed(leader_of, "tensor2-pipeline2", "model.bf16=true")
    assert worst.loss < 1e-5
    assert worst.grad_norm < 5e-3
    assert worst.gradient < 2e-2
    assert worst.weights < 1e-2


@pytest.mark.slow
def test_free_runs_stay_together() -> None:
    """Dense to 1e-5 over fifty steps; ternary no further apart than single ranks that split micro-batches otherwise."""
    world_size, overrides = LAYOUTS["tensor2-pipeline2"]
    dense, single = (run_of(world, (*SMALL, *DENSE, *o), STEPS, 0) for world, o in ((world_size, overrides), (1, ())))
    assert dense.losses == pytest.approx(single.losses, rel=1e-5)
    splits = [run_of(1, (*SMALL, f"training.micro_batch_size={size}"), STEPS, 0).losses for size in (1, 2, 4)]
    spread = max(abs(a - b) for i in range(3) for a, b in zip(splits[i], splits[i - 1], strict=True))
    ours = run_of(world_size, (*SMALL, *overrides), STEPS, 0).losses
    off = max(abs(a - b) for a, b in zip(ours, splits[1], strict=True))
    assert 0 < off <= spread
