"""DeepSpeed ZeRO around Megatron-Core's schedules.

Parameters are fp32 and so are their gradients, summed over micro-batches in place; ZeRO shards fp32 masters and Adam
moments over the data-parallel group. Experts have replicas of their own (expert-data-parallel groups), so a second
engine, which sees nothing but replicated parameters either, shards theirs; both clip by one norm over all parameters,
in which every expert counts once. DeepSpeed's own pipeline engine is not used: Megatron-Core's schedule runs on the
model inside `coalesce_grad_reduction()`, and one reduction follows it.

Under ZeRO-3 parameters are sharded too. DeepSpeed's hooks gather those of embeddings, head and norms around their
modules; a Sparse-BitNet layer works from its codes, so its weight is hidden from the hooks (sharded_weight.py) and
gathered once a step, for the codes.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import safe_set_full_fp32_param
from torch import Tensor, nn

from megatron_sbn.config import Recipe
from megatron_sbn.parallel.shard import LogicalParameter, is_expert
from megatron_sbn.parallel.state import ParallelState
from megatron_sbn.parallel.zero.fragments import MASTER, MOMENTS, Fragment, flat_place, sharded_place
from megatron_sbn.parallel.zero.gradient_norm import GradientNorm

_BUCKET = 1 << 27  # elements


@dataclass(frozen=True)
class _GroupsForDeepSpeed:
    """ParallelState in the words that DeepSpeed asks for.

    DeepSpeed counts a replicated parameter in the gradient norm on tensor rank 0 alone, and sums the norm over the
    "model parallel" group: that must hold the pipeline stages too.
    """

    state: ParallelState

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """All ranks of one replica."""
        return self.state.model_group

    def get_model_parallel_world_size(self) -> int:
        """Ranks of one replica."""
        return self.state.model_group.size()

    def get_model_parallel_rank(self) -> int:
        """Rank in the replica."""
        return self.state.model_group.rank()

    def get_tensor_model_parallel_rank(self) -> int:
        """Rank in the tensor-parallel group."""
        return self.state.tensor.rank

    def get_tensor_model_parallel_world_size(self) -> int:
        """Size of the tensor-parallel group."""
        return self.state.tensor.size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """Ranks that hold the same shards."""
        return self.state.data.group

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Global ranks of the data-parallel group."""
        return dist.get_process_group_ranks(self.state.data.group)

    def get_data_parallel_rank(self) -> int:
        """Rank in the data-parallel group."""
        return self.state.data.rank

    def get_data_parallel_world_size(self) -> int:
        """Size of the data-parallel group."""
        return self.state.data.size


class ZeroOptimizer:
    """AdamW with fp32 masters and moments, sharded over data parallelism by DeepSpeed ZeRO-1, -2 or -3."""

    def __init__(self, chunks: nn.ModuleList, recipe: Recipe, parallel: ParallelState) -> None:
        deepspeed_logger.setLevel(logging.ERROR)
        # Otherwise DeepSpeed compiles an extension at start on CPU, and fails where there is no compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(
            dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False, dist_init_required=False
        )
        self.stage = recipe.parallel.zero_stage
        named = list(chunks.named_parameters())
        experts = [parameter for name, parameter in named if is_expert(name)]
        rest = [parameter for name, parameter in named if not is_expert(name)]
        # ZeRO-3 hooks into the modules; otherwise DeepSpeed never sees more of a model than its parameters.
        self._engines = {"": _engine(chunks if self.stage == 3 else nn.ParameterList(rest), recipe, parallel)}
        if experts:
            self._engines["experts."] = _engine(nn.ParameterList(experts), recipe, parallel.seen_by_experts)
        self._norm = GradientNorm([engine.optimizer for engine in self._engines.values()], zero3=self.stage == 3)

    @contextlib.contextmanager
    def accumulation(self) -> Iterator[None]:
        """One optimizer step's forward and backward passes: gradients add up locally and are reduced at the end."""
        with contextlib.ExitStack() as stack:
            for engine in self._engines.values():
                stack.enter_context(engine.coalesce_grad_reduction())
            yield

    def step(self, lr: float, weight_decay: float, accept: Callable[[float], bool] = math.isfinite) -> float:
        """Clips, updates, gathers the new weights; returns the gradient norm before clipping (inf: not finite).

        Where the norm is not finite, or `accept` says no to it, nothing is updated and the gradients are dropped.
        `accept` answers the same on every rank.
        """
        norm = self._norm.measure()
        if not accept(norm):
            self._norm.refuse()
        for engine in self._engines.values():
            for group in engine.optimizer.optimizer.param_groups:
                group["lr"] = lr
                group["weight_decay"] = weight_decay if group["decays"] else 0.0
            engine.step()
        return norm

    @contextlib.contextmanager
    def gathered(self, parameters: Sequence[nn.Parameter], *, write: bool = False) -> Iterator[None]:
        """Parameters have all their elements for the length of the block; what was written is kept, with `write`.

        All data-parallel replicas take part, and write the same.
        """
        if self.stage < 3:
            yield
            return
        with deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0 if write else None):
            yield

    def read_by(self, module: nn.Module, parameter: nn.Parameter) -> None:
        """Says that `module` reads a parameter of another module, so that ZeRO-3 gathers it for both."""
        if self.stage == 3:
            deepspeed.zero.register_external_parameter(module, parameter)

    def assign(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Sets a parameter, and the master that this rank keeps of it, to `value` [its shape on this rank]."""
        with self.gathered([parameter], write=True), torch.no_grad():
            parameter.copy_(value)
        safe_set_full_fp32_param(parameter, value)

    @property
    def updates(self) -> int:
        """How many updates Adam has counted."""
        steps = {int(state["step"]) for _, state in self._masters() if "step" in state}
        assert len(steps) <= 1, "all parameter groups are updated together"
        return next(iter(steps), 0)

    def fragment(self, logical: LogicalParameter) -> Fragment | None:
        """What this rank keeps of a parameter's fp32 master and moments, as views; None where it keeps nothing.

        Before the first update there are no moments.
        """
        zero = self._engines["experts." if logical.is_expert else ""].optimizer
        place_of = sharded_place if self.stage == 3 else flat_place
        place = place_of(zero, logical.parameter)
        if place is None:
            return None
        state = zero.optimizer.state.get(place.master, {})
        flats = {MASTER: place.master.data} | {key: value for key, value in state.items() if value.dim()}
        return Fragment(
            place.start, {key: flat[place.offset : place.offset + place.length] for key, flat in flats.items()}
        )

    def reset_moments(self, updates: int) -> None:
        """Adam's moments as before any update, and its count of them as if there had been `updates`: to be filled."""
        for master, state in self._masters():
            if not updates:
                state.clear()
                continue
            state["step"] = torch.tensor(float(updates))  # on the CPU, where torch keeps it
            for key in MOMENTS:
                state.setdefault(key, torch.empty_like(master.data)).zero_()

    def _masters(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """(flat fp32 master, Adam state) of every parameter group."""
        for engine in self._engines.values():
            zero = engine.optimizer
            for master in zero.single_partition_of_fp32_groups if self.stage < 3 else zero.fp32_partitioned_groups_flat:
                yield master, zero.optimizer.state[master]


def _engine(model: nn.Module, recipe: Recipe, parallel: ParallelState) -> Any:  # noqa: ANN401 - DeepSpeed's own
    """DeepSpeed's engine for the parameters of `model`, sharded as `parallel` says. Schedules run it, not this."""
    optimizer = recipe.optimizer
    groups = decay_groups(model.parameters(), optimizer.weight_decay)
    betas = (optimizer.adam_beta1, optimizer.adam_beta2)
    # PyTorch's fused update is vectorised on CPU too; DeepSpeed's own for offload would have to be compiled first.
    fused = True if optimizer.cpu_offload else None
    base = torch.optim.AdamW(groups, lr=optimizer.lr, betas=betas, eps=optimizer.adam_eps, fused=fused)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=base,
        config=_engine_config(recipe, parallel, model),
        mpu=_GroupsForDeepSpeed(parallel),
        dist_init_required=False,
    )
    return engine


def decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, object]]:
    """Matrices decay; norms and biases (one-dimensional) do not."""
    parameters = [p for p in parameters if p.requires_grad]
    matrices = [p for p in parameters if p.dim() > 1]
    vectors = [p for p in parameters if p.dim() <= 1]
    groups: Sequence[tuple[list[nn.Parameter], bool]] = ((matrices, True), (vectors, False))
    return [
        {"params": members, "weight_decay": weight_decay if decays else 0.0, "decays": decays}
        for members, decays in groups
        if members
    ]


def _engine_config(recipe: Recipe, parallel: ParallelState, model: nn.Module) -> dict[str, object]:
    longest_vector = max((p.numel() for p in model.parameters() if p.dim() <= 1), default=0)
    offload = {"offload_optimizer": {"device": "cpu"}} if recipe.optimizer.cpu_offload else {}
    return {
        # DeepSpeed sees one accumulated batch a step: Megatron-Core's schedule owns the micro-batches.
        "train_micro_batch_size_per_gpu": max(1, recipe.training.global_batch_size // parallel.data.size),
        "gradient_accumulation_steps": 1,
        "gradient_clipping": recipe.optimizer.clip_grad,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        "zero_optimization": {
            "stage": recipe.parallel.zero_stage,
            "overlap_comm": False,
            # A gradient goes to the replica that keeps its masters, and to no other: half of an all-reduce.
            # DeepSpeed does so with these three together only, through a buffer of this many elements.
            "contiguous_gradients": True,
            "use_multi_rank_bucket_allreduce": False,
            "reduce_scatter": True,
            "reduce_bucket_size": min(_BUCKET, sum(p.numel() for p in model.parameters())),
            # Norms and biases stay whole, for layers that do a norm's work beside their own; matrices are all sharded.
            "stage3_param_persistence_threshold": longest_vector,
            **offload,
        },
    }
