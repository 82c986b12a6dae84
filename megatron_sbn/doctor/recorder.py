"""What this rank computes in a step, as shards of logical tensors: for comparing one layout with another.

    weights, gradients           by global name
    LAYER.codes .gamma .mask     as prepared: int8 [out, in], fp32 [out], bool [out, in]
    LAYER.x_q .s_x               int8 activations that a layer's product reads, and their scales
    hidden                       what the last norm reads, [batch, tokens, hidden]

Batches are a replica's share of the global one, in its order.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from megatron_sbn.doctor.logical_tensors import TensorShard, TensorShards
from megatron_sbn.layers.linear import ColumnParallelLinear, SparseBitLinear
from megatron_sbn.layers.weight_scales import layer_mask
from megatron_sbn.model import ModelChunks
from megatron_sbn.parallel.shard import LogicalShard
from megatron_sbn.training.step import Trainer


def weight_shards(trainer: Trainer) -> TensorShards:
    """Copies of this rank's parameters."""
    parameters = trainer.stages.parameters
    with trainer.zero.gathered([p.parameter for p in parameters]):
        return {p.name: TensorShard(p.shard, p.parameter.detach().clone(), p.counts) for p in parameters}


def gradient_shards(stages: ModelChunks) -> TensorShards:
    """Copies of this rank's whole gradients (0 where there is none), before ZeRO reduces and shards them."""
    return {
        p.name: TensorShard(
            p.shard, torch.zeros_like(p.parameter) if p.parameter.grad is None else p.parameter.grad.clone(), p.counts
        )
        for p in stages.parameters
    }


def prepared_shards(stages: ModelChunks) -> TensorShards:
    """gamma per row, codes and masks of this rank's layers."""
    shards = {}
    for name, layer in stages.state.layers.items():
        prepared, shard = layer.prepared, layer.weight_shard
        if prepared.codes is not None and prepared.gamma_per_row is not None:
            shards[f"{name}.codes"] = TensorShard(shard, prepared.codes.clone())
            shards[f"{name}.gamma"] = TensorShard(
                LogicalShard(shard.shape[:1], shard.rows), prepared.gamma_per_row.clone()
            )
        if prepared.mask is not None:
            shards[f"{name}.mask"] = TensorShard(shard, prepared.mask.clone())
    return shards


def mask_shards(stages: ModelChunks) -> TensorShards:
    """The masks of the weights as they are, where N < M: most kernels keep the codes alone."""
    layers = stages.state.layers.items()
    return {
        f"{name}.mask": TensorShard(layer.weight_shard, layer_mask(layer, *layer.settings.sparsity))
        for name, layer in layers
        if layer.settings.sparsity[0] < layer.settings.sparsity[1] and layer.prepared.mask is None
    }


@contextmanager
def recorded_hidden_states(trainer: Trainer) -> Iterator[TensorShards]:
    """Fills what it yields with this rank's part of the last norm's input, when the block ends."""
    shards: TensorShards = {}
    seen: list[Tensor] = []  # [tokens (/tp), micro-batch, hidden]
    last = list(trainer.stages.chunks)[-1]
    if not trainer.parallel.is_last_stage:
        yield shards
        return
    norm = last.get_submodule("decoder.final_layernorm")
    hook = norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    yield shards
    hook.remove()
    shards["hidden"] = _tokens_shard(trainer, seen)


@contextmanager
def recorded_tokens(trainer: Trainer) -> Iterator[TensorShards]:
    """Fills what it yields with the int8 activations and scales of every quantized layer, when the block ends.

    They are read from what layers keep for backward, so the block holds training steps. Layers of experts, whose
    tokens come in the router's order, are left out.
    """
    shards: TensorShards = {}
    kept: dict[str, list[tuple[Tensor, Tensor]]] = {}
    layers = {n: layer for n, layer in trainer.stages.state.layers.items() if ".experts." not in n}
    hooks = [hook for name, layer in layers.items() for hook in _keep_tokens(layer, kept.setdefault(name, []))]
    yield shards
    for hook in hooks:
        hook.remove()
    for name, steps in kept.items():
        if not steps:
            continue
        tokens, scales = [x_q for x_q, _ in steps], [s_x.unsqueeze(-1) for _, s_x in steps]
        column = isinstance(layers[name], ColumnParallelLinear)
        shards[f"{name}.x_q"] = _tokens_shard(trainer, tokens) if column else _features_shard(trainer, tokens)
        shards[f"{name}.s_x"] = _tokens_shard(trainer, scales, sequence_sharded=column)


def _keep_tokens(
    layer: SparseBitLinear, kept: list[tuple[Tensor, Tensor]]
) -> tuple[torch.utils.hooks.RemovableHandle, torch.utils.hooks.RemovableHandle]:
    """Hooks around forward, which saves int8 X_q first and s_x second."""
    saving: list[torch.autograd.graph.saved_tensors_hooks] = []
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    def begin(_module: nn.Module, _inputs: object) -> None:
        saved.clear()
        saving.append(torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor))
        saving[-1].__enter__()

    def end(_module: nn.Module, _inputs: object, _outputs: object) -> None:
        saving.pop().__exit__()
        if len(saved) > 1 and saved[0].dtype == torch.int8:
            kept.append((saved[0].clone(), saved[1].clone()))

    return layer.register_forward_pre_hook(begin), layer.register_forward_hook(end)


def _tokens_shard(trainer: Trainer, seen: list[Tensor], sequence_sharded: bool = True) -> TensorShard:
    """[tokens (/tp, if `sequence_sharded`), micro-batch, width] of all micro-batches, of [batch, tokens, width]."""
    parallel = trainer.parallel
    local = torch.cat([t.transpose(0, 1) for t in seen])
    share = local.shape[1]
    sequence_sharded = sequence_sharded and parallel.sequence_parallel
    columns = (parallel.tensor.rank * share, share) if sequence_sharded else (0, share)
    shape = (len(local) * parallel.data.size, share * (parallel.tensor.size if sequence_sharded else 1), local.shape[2])
    return TensorShard(LogicalShard(shape, _batch_rows(trainer, len(local)), columns), local)


def _features_shard(trainer: Trainer, seen: list[Tensor]) -> TensorShard:
    """[tokens, micro-batch, width/tp] of every micro-batch as a part of [batch, width, tokens]."""
    parallel = trainer.parallel
    local = torch.cat([t.permute(1, 2, 0) for t in seen]).contiguous()
    share = local.shape[1]
    shape = (len(local) * parallel.data.size, share * parallel.tensor.size, local.shape[2])
    columns = (parallel.tensor.rank * share, share)
    return TensorShard(LogicalShard(shape, _batch_rows(trainer, len(local)), columns), local)


def _batch_rows(trainer: Trainer, share: int) -> tuple[tuple[int, int], ...]:
    """This replica's samples in the global batch."""
    return ((trainer.parallel.data.rank * share, share),)
