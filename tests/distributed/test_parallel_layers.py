"""Column- and row-parallel layers alone, against sparse_bitlinear on one device; what they save and what they send."""

from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor
from training_runs import small_recipe, train_step, trainer_of

from megatron_sbn.doctor.logical_tensors import TensorShard, assemble, relative
from megatron_sbn.functional import sparse_bitlinear
from megatron_sbn.layers.experts import ExpertDown
from megatron_sbn.layers.linear import (
    ColumnParallelLinear,
    GatedLinear,
    QkvLinear,
    RowParallelLinear,
    SparseBitLinear,
)
from megatron_sbn.layers.weight_quantizer import WeightQuantizer
from megatron_sbn.model import transformer_config
from megatron_sbn.parallel import state as parallel_state
from megatron_sbn.parallel.cuda_shim import without_cuda
from megatron_sbn.parallel.shard import LogicalShard

TOKENS, BATCH, WIDTH, ROWS = 12, 2, 64, 128
KINDS: dict[str, type[SparseBitLinear]] = {
    "column": ColumnParallelLinear,
    "qkv": QkvLinear,
    "gated": GatedLinear,
    "row": RowParallelLinear,
}
# Rows of the logical weight that share a gamma, as sparse_bitlinear's splits want them: per part, in logical order.
HEAD, PER_GROUP, GROUPS = 8, 2, 4


@dataclass
class Outcome:
    """What a rank's layer gave; x, y and their gradients are [tokens, batch, features]."""

    y: TensorShard
    dx: TensorShard
    dw: TensorShard
    saved: list[tuple[str, int]]  # dtype and elements of tensors kept for backward
    sent: list[tuple[str, str, int]]  # collective, dtype and elements of the forward pass


def logical_tensors(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [tokens, batch, in], W [out, in] and dY [tokens, batch, out] of a test, the same on every rank."""
    rng = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=rng)  # noqa: E731
    return draw(TOKENS, BATCH, WIDTH), draw(rows, WIDTH) * 0.02, draw(TOKENS, BATCH, rows)


def run_layer(kind: str, tensor: int, sequence: bool, dtype: torch.dtype) -> Outcome:
    recipe = small_recipe((f"parallel.tensor={tensor}", f"parallel.sequence={str(sequence).lower()}"))
    with without_cuda():
        parallel = parallel_state.initialize(recipe)
        config, cut = transformer_config(recipe), {"bias": False, "skip_bias_add": False}
        if kind == "row":
            cut["input_is_parallel"] = True
        layer = KINDS[kind](WIDTH, ROWS, config=config, tp_group=parallel.tensor.group, **cut)
        outcome = exercise(layer, kind, parallel, dtype, recipe.linear)
        parallel_state.finalize()
    return outcome


def exercise(
    layer: SparseBitLinear, kind: str, parallel: parallel_state.ParallelState, dtype: torch.dtype, linear: object
) -> Outcome:
    x, w, dy = logical_tensors(ROWS)
    layer.weight.data.copy_(layer.weight_shard.take(w))
    WeightQuantizer({"layer": layer}, linear, parallel.tensor.group).prepare(0)
    rank, size = parallel.tensor.rank, parallel.tensor.size
    tokens = (rank * (TOKENS // size), TOKENS // size) if parallel.sequence_parallel else (0, TOKENS)
    column = kind != "row"
    features = (rank * (WIDTH // size), WIDTH // size)
    local_x = (x.narrow(0, *tokens) if column else x.narrow(2, *features)).to(dtype).contiguous().requires_grad_()
    rows = torch.cat([torch.arange(s, s + n) for s, n in layer.weight_shard.rows])
    local_dy = (dy[:, :, rows] if column else dy.narrow(0, *tokens)).to(dtype)
    saved: list[tuple[str, int]] = []
    sent: list[tuple[str, str, int]] = []

    def keep(t: Tensor) -> Tensor:
        saved.append((str(t.dtype), t.numel()))
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), recorded_collectives(sent):
        y, bias = layer(local_x)
    assert bias is None
    y.backward(local_dy)
    x_rows = (tokens,) if column else ((0, TOKENS),)
    dx = (
        TensorShard(LogicalShard(tuple(x.shape), x_rows), local_x.grad)
        if column
        else features_piece(local_x.grad, features)
    )
    y_piece = (
        TensorShard(
            LogicalShard((ROWS, TOKENS, BATCH), layer.weight_shard.rows), y.detach().permute(2, 0, 1).contiguous()
        )
        if column
        else TensorShard(LogicalShard((TOKENS, BATCH, ROWS), (tokens,)), y.detach())
    )
    return Outcome(y_piece, dx, TensorShard(layer.weight_shard, layer.weight.grad), saved, sent)


def features_piece(t: Tensor, features: tuple[int, int]) -> TensorShard:
    """[tokens, batch, in/tp] as rows of [in, tokens, batch]."""
    return TensorShard(LogicalShard((WIDTH, TOKENS, BATCH), (features,)), t.permute(2, 0, 1).contiguous())


class recorded_collectives:  # noqa: N801 - a context manager, used as a function
    """Appends (collective, dtype, elements given by this rank) of every collective in torch.distributed."""

    NAMES = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor")

    def __init__(self, sent: list[tuple[str, str, int]]) -> None:
        self._patches = [mock.patch.object(dist, name, self._recorded(name, sent)) for name in self.NAMES]

    @staticmethod
    def _recorded(name: str, sent: list[tuple[str, str, int]]) -> Callable[..., object]:
        original, given = getattr(dist, name), 0 if name == "all_reduce" else 1

        def collective(*args: object, **kwargs: object) -> object:
            sent.append((name, str(args[given].dtype), args[given].numel()))
            return original(*args, **kwargs)

        return collective

    def __enter__(self) -> None:
        for patch in self._patches:
            patch.start()

    def __exit__(self, *_: object) -> None:
        for patch in self._patches:
            patch.stop()


def expected(kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx, dw of sparse_bitlinear on one device; QKV rows sorted into q, k, v first, and back afterwards."""
    x, w, dy = logical_tensors(ROWS)
    order = torch.arange(ROWS)
    splits = [ROWS]
    if kind == "gated":
        splits = [ROWS // 2, ROWS // 2]
    if kind == "qkv":
        groups = order.view(GROUPS, (PER_GROUP + 2), HEAD)  # q q k v of every group
        order = torch.cat([groups[:, :PER_GROUP].flatten(), groups[:, PER_GROUP].flatten(), groups[:, -1].flatten()])
        splits = [GROUPS * PER_GROUP * HEAD, GROUPS * HEAD, GROUPS * HEAD]
    x, w = x.to(dtype).requires_grad_(), w[order].requires_grad_()
    y = sparse_bitlinear(x, w, splits=splits)
    y.backward(dy[..., order].to(dtype))
    back = order.argsort()
    return y.detach()[..., back], x.grad, w.grad[back]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("tensor", "sequence"), [(1, False), (2, False), (2, True), (4, True)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_layer_is_the_layer(kind: str, tensor: int, sequence: bool, dtype: torch.dtype) -> None:
    outcomes = run_ranks(run_layer, tensor, kind, tensor, sequence, dtype)
    y, dx, dw = expected(kind, dtype)
    ours = assemble([{"y": o.y, "dx": o.dx, "dw": o.dw} for o in outcomes])
    joined_y = ours["y"].permute(1, 2, 0) if kind != "row" else ours["y"]
    joined_dx = ours["dx"] if kind != "row" else ours["dx"].permute(1, 2, 0)
    assert torch.equal(joined_y, y)
    assert y.dtype == joined_dx.dtype == dtype
    # In bf16 every rank rounds its own partial dX before the sum.
    assert relative(joined_dx, dx) < (1e-6 if dtype == torch.float32 or tensor == 1 or kind == "row" else 2**-7)
    assert relative(ours["dw"], dw) < 1e-6
    assert ours["dw"].dtype == torch.float32


@pytest.mark.parametrize(("kind", "sequence"), [("qkv", True), ("gated", False), ("row", True), ("row", False)])
def test_integers_are_saved_and_sent(kind: str, sequence: bool) -> None:
    (ours, _) = run_ranks(run_layer, 2, kind, 2, sequence, torch.bfloat16)
    tokens = TOKENS // 2 if sequence and kind != "row" else TOKENS
    width = WIDTH // 2 if kind == "row" else WIDTH
    out = ROWS if kind == "row" else ROWS // 2
    x_q, s_x = ("torch.int8", tokens * BATCH * width), ("torch.float32", tokens * BATCH)
    # X_q and s_x of this rank's tokens. No bf16 X; codes and gamma are the layer's own.
    assert ours.saved == [x_q, s_x]
    accumulator = "reduce_scatter_tensor" if sequence else "all_reduce"
    assert (
        ours.sent
        == {
            ("qkv", True): [("all_gather_into_tensor", *x_q), ("all_gather_into_tensor", *s_x)],
            ("gated", False): [],
            ("row", sequence): [("all_reduce", *s_x), (accumulator, "torch.float32", TOKENS * BATCH * out)],
        }[kind, sequence]
    )


def preparation_traffic() -> tuple[list[tuple[str, str, int]], int, int]:
    recipe = small_recipe(("parallel.tensor=2", "model.add_bias_linear=true"))
    sent: list[tuple[str, str, int]] = []
    with trainer_of(recipe) as trainer:
        state = trainer.stages.state
        before = state.preparations
        with recorded_collectives(sent):
            state.prepare(0)
        train_step(trainer, 0)
        return sent, before, state.preparations


def test_a_preparation_is_one_max_and_one_sum_for_all_layers() -> None:
    parts = 4 * (3 + 1 + 2 + 1)
    for sent, before, after in run_ranks(preparation_traffic, 2):
        assert sent == [("all_reduce", "torch.float32", parts), ("all_reduce", "torch.int64", parts)]
        assert (before, after) == (1, 3)


def refused(kind: str, arguments: dict[str, bool]) -> str:
    with without_cuda():
        recipe = small_recipe()
        parallel = parallel_state.initialize(recipe)
        with pytest.raises(ValueError, match="must be|not supported") as refusal:
            KINDS[kind](
                WIDTH, ROWS, config=transformer_config(recipe), tp_group=parallel.tensor.group, bias=False,
                skip_bias_add=False, **arguments,
            )  # fmt: skip
        parallel_state.finalize()
    return str(refusal.value)


def test_what_a_layer_cannot_do_is_refused() -> None:
    assert "gather_output" in run_ranks(refused, 1, "column", {"gather_output": True})[0]
    assert "input_is_parallel" in run_ranks(refused, 1, "row", {"input_is_parallel": False})[0]


def biases_added() -> tuple[bool, bool]:
    with without_cuda():
        recipe = small_recipe(("model.add_bias_linear=true",))
        parallel = parallel_state.initialize(recipe)
        make = {"config": transformer_config(recipe), "tp_group": parallel.tensor.group, "bias": True}
        make |= {"skip_bias_add": True}  # as Megatron-Core asks of its own
        row = make | {"input_is_parallel": True}
        x, w, _ = logical_tensors(ROWS)
        results = []
        for kind, given in ((ExpertDown, row), (RowParallelLinear, row), (ColumnParallelLinear, make)):
            layer = kind(WIDTH, ROWS, **given)
            layer.weight.data.copy_(w)
            layer.bias.data.fill_(0.5)
            WeightQuantizer({"layer": layer}, recipe.linear, parallel.tensor.group).prepare(0)
            results.append(layer(x))
        parallel_state.finalize()
    (y, bias), *added = results
    return all(torch.equal(y + bias, own) and left is None for own, left in added), bool((bias == 0.5).all())


def test_a_bias_is_added_here_and_an_experts_is_left_to_the_caller() -> None:
    assert run_ranks(biases_added, 1) == [(True, True)]
