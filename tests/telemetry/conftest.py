"""A world of one gloo rank, and the layers that telemetry measures."""

import pytest
import torch
import torch.distributed as dist
from megatron.core.model_parallel_config import ModelParallelConfig

from megatron_sbn.layers.linear import ColumnParallelLinear, GatedLinear, RowParallelLinear
from megatron_sbn.parallel.state import Axis, ParallelState


@pytest.fixture(scope="session")
def parallel():
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD
    alone = Axis.of(group)
    return ParallelState(
        rank=0,
        world_size=1,
        device=torch.device("cpu"),
        tensor=alone,
        pipeline=alone,
        data=alone,
        expert=alone,
        expert_data=alone,
        model_group=group,
        tensor_data_group=group,
        expert_model_group=group,
        sequence_parallel=False,
    )


@pytest.fixture
def layers(parallel):
    """Three kinds of layers with Gaussian weights; widths that are multiples of 8, 6 and 4 but not of 16."""
    config = ModelParallelConfig(params_dtype=torch.float32, sequence_parallel=False)
    config.use_cpu_initialization = True
    same = {"config": config, "tp_group": parallel.tensor.group, "bias": False, "skip_bias_add": False}
    made = {
        "decoder.layers.0.column": ColumnParallelLinear(24, 18, **same),
        "decoder.layers.0.gated": GatedLinear(48, 30, **same),
        "decoder.layers.1.row": RowParallelLinear(72, 10, input_is_parallel=True, **same),
    }
    generator = torch.Generator().manual_seed(7)
    for layer in made.values():
        layer.weight.data.normal_(generator=generator).mul_(0.02)
    return made
