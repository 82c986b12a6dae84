"""Ranks and groups of one process: made once from the recipe's layout, then passed, never global.

The grid, slowest axis first, is [pipeline, data, tensor]: neighbouring ranks share a tensor-parallel group, as in
Megatron-Core, whose own `parallel_state` is initialized here with the same sizes.

Experts are whole on a rank, so they see another grid of the same ranks, [pipeline, expert data, expert]: neighbouring
ranks hold different experts, and an expert's replicas are the ranks along `expert_data`.
"""

import datetime
import os
import socket
import time
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from megatron.core import parallel_state as megatron_state
from megatron.core import tensor_parallel

from megatron_sbn.config import Recipe
from megatron_sbn.errors import RankLostError, RecipeError
from megatron_sbn.launch import environment

TIMEOUT = datetime.timedelta(minutes=30)
_CONNECTING = datetime.timedelta(seconds=5)
_STORE_KEY = "megatron_sbn/store"


@dataclass(frozen=True)
class Axis:
    """One axis of the grid: this process's place along it, and the ranks that differ in that place alone."""

    rank: int
    size: int
    group: dist.ProcessGroup

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> "Axis":
        """The axis of a group that this process is in."""
        return cls(group.rank(), group.size(), group)


@dataclass(frozen=True)
class ParallelState:
    """Where this process stands: `rank` of `world_size`, as arange(world).view(pipeline, data, tensor) numbers them.

    `model_group` are all ranks that hold one replica (tensor x pipeline), `tensor_data_group` all ranks of one pipeline
    stage, `expert_model_group` those of one replica of all experts (expert x pipeline).
    """

    rank: int
    world_size: int
    device: torch.device
    tensor: Axis
    pipeline: Axis
    data: Axis
    expert: Axis
    expert_data: Axis
    model_group: dist.ProcessGroup
    tensor_data_group: dist.ProcessGroup
    expert_model_group: dist.ProcessGroup
    sequence_parallel: bool

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes the loss."""
        return self.pipeline.rank == self.pipeline.size - 1

    @property
    def seen_by_experts(self) -> "ParallelState":
        """The same ranks as an expert's weight sees them: whole on each, with its own replicas and model group."""
        whole = replace(self.tensor, rank=0, size=1)
        return replace(self, tensor=whole, data=self.expert_data, model_group=self.expert_model_group)

    def describe(self) -> str:
        """The layout in one phrase."""
        sequence = ", sequence-parallel" if self.sequence_parallel else ""
        expert = f", expert {self.expert.size}," if self.expert.size > 1 else ""
        return (
            f"tensor {self.tensor.size}{sequence} x pipeline {self.pipeline.size} x data {self.data.size}{expert} "
            f"on {self.world_size} {self.device.type} rank{'s' if self.world_size > 1 else ''}"
        )


def initialize(recipe: Recipe) -> ParallelState:
    """Joins the process group and makes the recipe's groups. The world size must have been checked."""
    rank, world_size = environment.rank(), environment.world_size()
    device = _local_device(recipe.device)
    if not dist.is_initialized():
        _join(rank, world_size, device)
    parallel = recipe.parallel
    megatron_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=1,
        create_gloo_process_groups=False,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(recipe.training.seed)
    return ParallelState(
        rank=rank,
        world_size=world_size,
        device=device,
        tensor=Axis.of(megatron_state.get_tensor_model_parallel_group()),
        pipeline=Axis.of(megatron_state.get_pipeline_model_parallel_group()),
        data=Axis.of(megatron_state.get_data_parallel_group()),
        expert=Axis.of(megatron_state.get_expert_model_parallel_group()),
        expert_data=Axis.of(megatron_state.get_expert_data_parallel_group()),
        model_group=megatron_state.get_model_parallel_group(),
        tensor_data_group=megatron_state.get_tensor_and_data_parallel_group(),
        expert_model_group=megatron_state.get_expert_tensor_model_pipeline_parallel_group(),
        sequence_parallel=parallel.sequence and parallel.tensor > 1,
    )


def finalize() -> None:
    """Leaves the groups, so that another layout can be made in the same process."""
    megatron_state.destroy_model_parallel()


def _local_device(wanted: str) -> torch.device:
    """This rank's GPU, or the CPU. Raises RecipeError where a GPU is wanted, or others have one, and there is none."""
    # DeepSpeed reads LOCAL_RANK too, and refuses to start without it.
    local_rank = environment.local_rank()
    os.environ["LOCAL_RANK"] = str(local_rank)
    if not torch.cuda.is_available():
        if wanted == "cuda":
            raise RecipeError("device = cuda: PyTorch finds no GPU here; set device=cpu, or look at nvidia-smi")
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    if local_rank >= gpus:
        raise RecipeError(
            f"local rank {local_rank} has no GPU: this machine shows {gpus}; start at most {gpus} ranks on it, "
            "or set device=cpu"
        )
    # One hardware queue: collectives that overlap with GEMMs then start in the order in which they were issued.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _join(rank: int, world_size: int, device: torch.device) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    if environment.in_srun_task() and world_size > 1:
        os.environ["MASTER_ADDR"] = environment.master_address()
        os.environ["MASTER_PORT"] = str(environment.master_port())
    if environment.store_outlives_ranks() and world_size > 1:
        store = _fresh_store(rank, world_size)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
        return
    if "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=TIMEOUT)
        return
    if world_size > 1:
        raise RecipeError("environment variable MASTER_ADDR is not set; start several ranks with torchrun or srun")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    store = dist.TCPStore("127.0.0.1", port, 1, is_master=True)
    dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=TIMEOUT)


def _fresh_store(rank: int, world_size: int) -> dist.Store:
    """A store of this attempt's own, in rank 0's process; its address is in the launcher's store.

    torchrun keeps one store over its restarts, with the addresses that the ranks of the last attempt left in it:
    whoever connected by those would wait for the dead. The address of a dead rank 0's store answers no more, and so is
    read again until it is that of a living one. Raises RankLostError where there is none within TIMEOUT.
    """
    shared, *_ = next(dist.rendezvous("env://", rank, world_size, timeout=TIMEOUT))
    host = os.environ["MASTER_ADDR"]
    if rank == 0:
        own = dist.TCPStore(host, 0, world_size, is_master=True, timeout=TIMEOUT, wait_for_workers=False)
        shared.set(_STORE_KEY, f"{host} {own.port}")
        return own
    deadline = time.monotonic() + TIMEOUT.total_seconds()
    while time.monotonic() < deadline:
        address, port = shared.get(_STORE_KEY).decode().split()
        try:
            store = dist.TCPStore(address, int(port), world_size, timeout=_CONNECTING, wait_for_workers=False)
        except dist.DistNetworkError:
            time.sleep(1)
            continue
        store.set_timeout(TIMEOUT)
        return store
    raise RankLostError(f"rank 0 does not answer at {host} within {TIMEOUT}; look at its log")
