"""Bytes per collective: every kind alone, and whole optimizer steps against what the layout says must be sent.

Expected figures are written down from shapes here; nothing of `parallel.traffic` is used to make them.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import cases
from ranks import run_ranks
from training_runs import small_recipe, train_step, trainer_of

from megatron_sbn.config import Recipe
from megatron_sbn.parallel.comm_counter import METHODS, CommCounter, Totals, group_names, step_metrics

RANKS = 3
FP32, BF16, INT64 = 4, 2, 8
TENSOR2, PIPELINE2, WHOLE = "parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=false"
DENSE, HALF = "linear.weight_format=dense", "model.bf16=true"
TIED = "model.share_embeddings_and_output_weights=true"


# --- one collective --------------------------------------------------------------------------------------------------


def _sends(t: torch.Tensor, batched: bool) -> None:
    """Rank 0 to rank 1."""
    rank = dist.get_rank()
    if rank > 1:
        return
    if batched:
        operation = dist.P2POp(dist.isend if rank == 0 else dist.irecv, t, 1 - rank)
        for work in dist.batch_isend_irecv([operation]):
            work.wait()
    else:
        work = dist.isend(t, 1) if rank == 0 else dist.irecv(t, 0)
        assert work is not None
        work.wait()


def _coalesced(t: torch.Tensor) -> None:
    with dist._coalescing_manager():
        dist.all_reduce(t)
        dist.all_reduce(t.clone())


def _unequal_all_to_all(t: torch.Tensor) -> None:
    """Rank r sends one row to 0, two to 1, three to 2."""
    rows = torch.ones(6, 5)
    mine = (dist.get_rank() + 1) * RANKS
    dist.all_to_all_single(torch.empty(mine, 5), rows, [mine // RANKS] * RANKS, [1, 2, 3])


def _parts(t: torch.Tensor) -> list[torch.Tensor]:
    return [torch.empty_like(t) for _ in range(RANKS)]


S = 24  # bytes of the tensor that operations are given: fp32 [6]
ON_ROOT = [0, S, 0]
OPERATIONS: dict[str, tuple[str, Callable[[torch.Tensor], object], list[float]]] = {
    "all_reduce": ("all_reduce", dist.all_reduce, [2 * 2 / 3 * S] * 3),
    "asynchronous": ("all_reduce", lambda t: dist.all_reduce(t, async_op=True).wait(), [2 * 2 / 3 * S] * 3),
    "coalesced": ("all_reduce", _coalesced, [2 * 2 * 2 / 3 * S] * 3),
    "all_gather": ("all_gather", lambda t: dist.all_gather(_parts(t), t), [2 * S] * 3),
    "all_gather_into_tensor": (
        "all_gather",
        lambda t: dist.all_gather_into_tensor(torch.empty(18), t),
        [2 * S] * 3,
    ),
    "reduce_scatter": ("reduce_scatter", lambda t: dist.reduce_scatter(t, _parts(t)), [2 * S] * 3),
    "reduce_scatter_tensor": (
        "reduce_scatter",
        lambda t: dist.reduce_scatter_tensor(torch.empty(2), t),
        [2 / 3 * S] * 3,
    ),
    "all_to_all": ("all_to_all", lambda t: dist.all_to_all_single(torch.empty(6), t), [2 / 3 * S] * 3),
    "all_to_all, unequal": ("all_to_all", _unequal_all_to_all, [(6 - own) * 5 * FP32 for own in (1, 2, 3)]),
    "broadcast": ("broadcast", lambda t: dist.broadcast(t, 1), ON_ROOT),
    "reduce": ("reduce", lambda t: dist.reduce(t, 1), [S, 0, S]),
    "gather": ("gather", lambda t: dist.gather(t, _parts(t) if dist.get_rank() == 1 else None, 1), [S, 0, S]),
    "scatter": (
        "scatter",
        lambda t: dist.scatter(t, _parts(t) if dist.get_rank() == 1 else None, 1),
        [0, 2 / 3 * 3 * S, 0],
    ),
    "send": ("send", lambda t: _sends(t, batched=False), [S, 0, 0]),
    "batched send": ("send", lambda t: _sends(t, batched=True), [S, 0, 0]),
    "barrier": ("barrier", lambda _: dist.barrier(), [0, 0, 0]),
}


def count_operations() -> dict[str, Totals]:
    """Totals of every operation on the world's group, named "everybody"."""
    counted = {}
    with CommCounter({dist.group.WORLD.group_name: "everybody"}) as traffic:
        for name, (_, operation, _) in OPERATIONS.items():
            traffic.restart()
            operation(torch.ones(6))
            counted[name] = traffic.totals()
    return counted


def test_every_kind_of_collective_is_counted() -> None:
    for rank, counted in enumerate(run_ranks(count_operations, RANKS)):
        for name, (kind, _, sent) in OPERATIONS.items():
            if sent[rank]:
                assert counted[name] == {("everybody", kind): (1, pytest.approx(sent[rank]))}, name
            else:
                assert sum(total for _, total in counted[name].values()) == 0, name


def count_by_group() -> tuple[list[Totals], bool]:
    """Totals of groups of the same ranks, of one that has no name and of one rank; and after counting has ended."""
    ranks = list(range(RANKS))
    first, second, unnamed = (dist.new_group(ranks) for _ in range(3))
    alone = [dist.new_group([rank]) for rank in ranks][dist.get_rank()]
    methods = {name: vars(dist.ProcessGroup)[name] for name in METHODS if name in vars(dist.ProcessGroup)}
    names = {first.group_name: "first", second.group_name: "second", alone.group_name: "alone"}
    totals = []
    traffic = CommCounter(names)
    with traffic:
        for group in (first, second, unnamed, alone):
            dist.all_reduce(torch.ones(3, dtype=torch.int64), group=group)
        totals.append(traffic.totals())
    restored = all(vars(dist.ProcessGroup)[name] is method for name, method in methods.items())
    dist.all_reduce(torch.ones(3), group=first)
    totals.append(traffic.totals())
    return totals, restored


def test_groups_are_kept_apart_and_nothing_is_left_behind() -> None:
    once = (1, pytest.approx(2 * 2 / 3 * 3 * INT64))
    for (counted, after), restored in run_ranks(count_by_group, RANKS):
        keys = [("first", "all_reduce"), ("second", "all_reduce"), ("other", "all_reduce")]
        assert counted == dict.fromkeys(keys, once) | {("alone", "all_reduce"): (1, 0.0)}
        assert after == counted
        assert restored


def test_every_method_that_sends_is_counted() -> None:
    """A method that torch adds to its groups is either counted, or looked at and entered here."""
    sends_nothing = {
        "abort", "barrier", "bound_device_id", "boxed", "get_group_store", "group_desc", "group_name",
        "merge_remote_group", "monitored_barrier", "name", "rank", "recv", "recv_anysource", "set_timeout", "shutdown",
        "size", "split_group", "unbox", "use_pg_for_symm_mem_rendezvous", "BackendType", "CUSTOM", "GLOO", "MPI",
        "NCCL", "UCC", "UNDEFINED", "XCCL",
    }  # fmt: skip
    # From torch 2.14 on. A window is for one-sided communication, which nothing here uses.
    sends_nothing |= {
        "get_backend", "get_reconfigure_handle", "new_window", "reconfigure", "register_abort_hook",
        "register_post_hook", "register_pre_hook", "supports_reconfigure", "supports_window",
        "unregister_abort_hook", "unregister_post_hook", "unregister_pre_hook",
    }  # fmt: skip
    public = {name for name in vars(dist.ProcessGroup) if not name.startswith("_")}
    assert public - sends_nothing - set(METHODS) == set()
    base = {name for name in vars(dist.ProcessGroup) if name.endswith("_base")}
    assert base <= set(METHODS)


# --- one optimizer step ----------------------------------------------------------------------------------------------

Expected = dict[tuple[str, str], float]


class Arithmetic:
    """What one rank sends in one step of a recipe without pipelining: sizes, and sums by (group, kind)."""

    def __init__(self, recipe: Recipe, ranks: int) -> None:
        model, training = recipe.model, recipe.training
        self.recipe, self.n = recipe, ranks
        self.layers, self.hidden, self.ffn = model.num_layers, model.hidden_size, model.ffn_hidden_size
        self.tokens = training.micro_batch_size * model.seq_length
        self.width = BF16 if model.bf16 else FP32  # of hidden states
        self.micro_batches = training.global_batch_size // training.micro_batch_size
        self.bytes: dict[str, float] = defaultdict(float)

    def all_reduce(self, size: float, times: int = 1) -> None:
        self.bytes["all_reduce"] += times * 2 * (self.n - 1) / self.n * size

    def all_gather(self, whole: float, times: int = 1) -> None:
        self.bytes["all_gather"] += times * (self.n - 1) * whole / self.n

    def reduce_scatter(self, size: float, times: int = 1) -> None:
        self.bytes["reduce_scatter"] += times * (self.n - 1) / self.n * size

    def tensor_parallel(self) -> dict[str, float]:
        """Forward, backward and preparation, by kind."""
        ternary, sequence = self.recipe.linear.weight_format == "ternary", self.recipe.parallel.sequence
        h, t, m = self.hidden, self.tokens, self.micro_batches
        linears = 2 * self.layers  # as many column- as row-parallel ones
        reduce = self.reduce_scatter if sequence else self.all_reduce
        reduce(t * h * FP32, m)  # looked-up embeddings
        reduce(t * h * FP32, m * linears)  # accumulators of row-parallel layers
        reduce(t * h * self.width, m * (linears + 1))  # dX of column-parallel layers and the head
        self.all_reduce(t * (1 + 2) * FP32, m)  # loss: a maximum, two sums
        if ternary:
            self.all_reduce(t * FP32, m * linears)  # magnitudes of row-parallel inputs
        if sequence:
            self.all_gather(t * h * FP32, m)  # gradient of the embeddings
            self.all_gather(t * h * self.width, m * (linears + 1))  # dY of row-parallel layers; the head's input
            token = h + FP32 if ternary else h * self.width  # X_q and s_x, or X
            self.all_gather(t * token, 2 * m * linears)  # forward and backward
            self.all_reduce((linears + 1) * h * FP32)  # gradients of the norms
        if ternary:
            parts = self.layers * (3 + 1 + 2 + 1)
            self.all_reduce(parts * (FP32 + INT64))
        return dict(self.bytes)


def counted_step(overrides: tuple[str, ...]) -> tuple[Totals, dict[str, float], int]:
    """Totals and metrics of a second step, and the parameters of this rank."""
    with trainer_of(small_recipe(overrides)) as trainer, CommCounter(group_names(trainer.parallel)) as traffic:
        train_step(trainer, 0)
        traffic.restart()
        train_step(trainer, 1)
        totals = traffic.totals()
        parameters = sum(p.parameter.numel() for p in trainer.stages.parameters)
        return totals, step_metrics(totals, trainer.parallel), parameters


def sent_by(totals: Totals, group: str) -> dict[str, float]:
    """Bytes by kind of one group."""
    return {kind: total for (name, kind), (_, total) in totals.items() if name == group and total}


@pytest.mark.parametrize("dtype", [(), (HALF,)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("weights", [(), (DENSE,)], ids=["ternary", "dense"])
@pytest.mark.parametrize("sequence", [(), (WHOLE,)], ids=["sequence", "whole"])
def test_tensor_parallel_step(sequence: tuple[str, ...], weights: tuple[str, ...], dtype: tuple[str, ...]) -> None:
    overrides = (TENSOR2, *sequence, *weights, *dtype)
    expected = Arithmetic(small_recipe(overrides), 2).tensor_parallel()
    ranks = run_ranks(counted_step, 2, overrides)
    for totals, metrics, _ in ranks:
        assert sent_by(totals, "tensor") == expected
        assert metrics == {"bytes_tensor": 2 * sum(expected.values())}


@pytest.mark.parametrize(
    "overrides", [(), (HALF,), ("parallel.virtual_pipeline=2",)], ids=["fp32", "bf16", "interleaved"]
)
def test_pipeline_sends_hidden_states_and_their_gradients(overrides: tuple[str, ...]) -> None:
    sizes = Arithmetic(small_recipe((PIPELINE2, *overrides)), 2)
    crossings = 3 if "parallel.virtual_pipeline=2" in overrides else 1  # of a micro-batch, between chunks of two ranks
    both_ways = 2 * sizes.micro_batches * crossings * sizes.tokens * sizes.hidden * sizes.width
    loss = 2 * INT64  # one fp64 number, all-reduced by two ranks
    ranks = run_ranks(counted_step, 2, (PIPELINE2, *overrides))
    assert sum(sent_by(totals, "pipeline")["send"] for totals, _, _ in ranks) == both_ways
    assert all(metrics == {"bytes_pipeline": both_ways + loss} for _, metrics, _ in ranks)


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_reduces_gradients_and_gathers_weights(stage: int) -> None:
    for totals, metrics, parameters in run_ranks(counted_step, 2, (f"parallel.zero_stage={stage}",)):
        sent = sent_by(totals, "data")
        assert sent["reduce"] == sent["all_gather"] == parameters * FP32 / 2
        # The loss, in fp64, and what the clipping norm takes.
        assert sent["all_reduce"] <= 32
        assert metrics == {"bytes_data": 2 * sum(sent.values())}


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_zero3_gathers_a_ternary_weight_once_a_step(micro_batches: int) -> None:
    """For its codes; embedding and head, which are dense, for forward and for backward of every micro-batch."""
    overrides = ("parallel.zero_stage=3", f"training.micro_batch_size={2 // micro_batches}")
    model = small_recipe().model
    dense = model.padded_vocab_size * model.hidden_size  # of the embedding, and of the head
    ((_, _, parameters),) = run_ranks(counted_step, 1, ())
    linears = parameters - 2 * dense - (2 * model.num_layers + 1) * model.hidden_size
    for totals, metrics, _ in run_ranks(counted_step, 2, overrides):
        sent = sent_by(totals, "data")
        assert sent["reduce_scatter"] == parameters * FP32 / 2
        rest = sent["all_gather"] - linears * FP32 / 2
        assert 2 * dense * FP32 / 2 < rest < micro_batches * 4 * dense * FP32 / 2 + (parameters - linears) * FP32 / 2
        assert rest < linears * FP32 / 2
        assert metrics == {"bytes_data": 2 * sum(sent.values())}


LAYOUTS: dict[str, tuple[int, tuple[str, ...], set[str]]] = {
    "single": (1, (), set()),
    "tensor2-pipeline2-tied": (4, (TENSOR2, PIPELINE2, TIED), {"bytes_tensor", "bytes_pipeline"}),
    "tensor2-data2": (4, (TENSOR2, "parallel.zero_stage=2"), {"bytes_tensor", "bytes_data"}),
    "pipeline2-data2": (4, (PIPELINE2, "training.micro_batch_size=1"), {"bytes_pipeline", "bytes_data"}),
    "tensor2-data2-zero3": (4, (TENSOR2, "parallel.zero_stage=3"), {"bytes_tensor", "bytes_data"}),
    "tensor2-expert2": (
        2,
        (TENSOR2, "model.num_moe_experts=4", "parallel.expert=2", "model.num_layers=2"),
        {"bytes_tensor", "bytes_expert"},
    ),
    "data2-expert2-balanced": (
        2,
        ("model.num_moe_experts=4", "parallel.expert=2", "model.num_layers=2", "model.moe_aux_loss_coeff=0.01"),
        {"bytes_data", "bytes_expert"},
    ),
}


@pytest.mark.parametrize("layout", cases(LAYOUTS, [name for name in LAYOUTS if name != "tensor2-data2-zero3"]))
def test_all_that_is_sent_is_under_a_known_group(layout: str) -> None:
    world_size, overrides, names = LAYOUTS[layout]
    ranks = run_ranks(counted_step, world_size, overrides)
    groups = {group for totals, _, _ in ranks for group, _ in totals}
    assert groups <= {"tensor", "pipeline", "data", "model", "expert"}
    metrics = ranks[0][1]
    assert set(metrics) == names
    assert all(rank[1] == metrics for rank in ranks)
    for name, value in metrics.items():
        group = name.removeprefix("bytes_")
        assert value == sum(sum(sent_by(totals, group).values()) for totals, _, _ in ranks) > 0
    # The group of all ranks of a replica: a clipping norm, no more.
    assert all(sum(sent_by(totals, "model").values()) < 64 for totals, _, _ in ranks)


def test_a_tied_embedding_goes_over_the_pipeline_once_a_step() -> None:
    recipe = small_recipe((PIPELINE2, TIED))
    embedding = recipe.model.padded_vocab_size * recipe.model.hidden_size * FP32
    for totals, _, _ in run_ranks(counted_step, 2, (PIPELINE2, TIED)):
        assert sent_by(totals, "pipeline")["all_reduce"] == embedding + INT64


# --- what ternary layers save ----------------------------------------------------------------------------------------


def gathered_in_forward(overrides: tuple[str, ...]) -> float:
    """Bytes that the first QKV layer gathers for one micro-batch, under sequence parallelism."""
    recipe = small_recipe((TENSOR2, HALF, *overrides))
    with trainer_of(recipe) as trainer, CommCounter(group_names(trainer.parallel)) as traffic:
        layer = trainer.stages.state.layers["decoder.layers.0.self_attention.linear_qkv"]
        x = torch.ones(recipe.model.seq_length // 2, recipe.training.micro_batch_size, recipe.model.hidden_size)
        with torch.no_grad():
            layer(x.bfloat16())
        (key,) = traffic.totals()
        assert key == ("tensor", "all_gather")
        return traffic.totals()[key][1]


def test_ternary_layers_gather_half_of_what_bf16_layers_gather() -> None:
    recipe = small_recipe()
    tokens = recipe.training.micro_batch_size * recipe.model.seq_length // 2
    (ternary, _), (dense, _) = (run_ranks(gathered_in_forward, 2, case) for case in ((), (DENSE,)))
    assert dense == tokens * recipe.model.hidden_size * BF16
    assert ternary == dense / 2 + tokens * FP32


class Started(CommCounter):
    """Notes for every collective whether it was started without waiting for its end."""

    def __init__(self, names: dict[str, str]) -> None:
        super().__init__(names)
        self.asynchronous: list[tuple[str, bool]] = []

    def _count(self, group: dist.ProcessGroup, kind: str, position: int, args: tuple[Any, ...]) -> None:
        self.asynchronous.append((kind, args[-1].asyncOp))


@pytest.mark.parametrize("overrides", [(), (WHOLE,)], ids=["sequence", "whole"])
def test_backward_waits_for_no_collective_of_a_column_parallel_layer(overrides: tuple[str, ...]) -> None:
    gathers = [("all_gather", True)] * 2 if not overrides else []
    reduce = ("reduce_scatter", True) if not overrides else ("all_reduce", True)
    for forward, backward in run_ranks(started_in_column_layer, 2, overrides):
        assert forward == gathers
        assert backward == [*gathers, reduce]


def started_in_column_layer(overrides: tuple[str, ...]) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """Collectives of the first QKV layer in forward and in backward."""
    recipe = small_recipe((TENSOR2, *overrides))
    with trainer_of(recipe) as trainer, Started(group_names(trainer.parallel)) as traffic:
        layer = trainer.stages.state.layers["decoder.layers.0.self_attention.linear_qkv"]
        tokens = recipe.model.seq_length // (1 if overrides else 2)
        y, _ = layer(torch.ones(tokens, 1, recipe.model.hidden_size, requires_grad=True))
        forward = list(traffic.asynchronous)
        y.sum().backward()
        return forward, traffic.asynchronous[len(forward) :]
