"""What this rank computes in a step, as pieces of logical tensors: for comparing one layout with another.

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

from megatron_sbn.doctor.logical_tensors import Piece, Pieces
from megatron_sbn.layers.linear import ColumnParallelLinear, SparseBitLinear
from megatron_sbn.layers.weight_scales import layer_mask
from megatron_sbn.model import ModelChunks
from megatron_sbn.parallel.shard import LogicalShard
from megatron_sbn.training.step import Trainer


def weight_pieces(trainer: Trainer) -> Pieces:
    """Copies of this rank's parameters."""
    parameters = trainer.stages.parameters
    with trainer.zero.whole([p.parameter for p in parameters]):
        return {p.name: Piece(p.shard, p.parameter.detach().clone(), p.counts) for p in parameters}


def gradient_pieces(stages: ModelChunks) -> Pieces:
    """Copies of this rank's whole gradients (0 where there is none), before ZeRO reduces and cuts them."""
    return {
        p.name: Piece(
            p.shard, torch.zeros_like(p.parameter) if p.parameter.grad is None else p.parameter.grad.clone(), p.counts
        )
        for p in stages.parameters
    }


def prepared_pieces(stages: ModelChunks) -> Pieces:
    """gamma per row, codes and masks of this rank's layers."""
    pieces = {}
    for name, layer in stages.state.layers.items():
        prepared, shard = layer.prepared, layer.weight_shard
        if prepared.codes is not None and prepared.gamma_per_row is not None:
            pieces[f"{name}.codes"] = Piece(shard, prepared.codes.clone())
            pieces[f"{name}.gamma"] = Piece(LogicalShard(shard.shape[:1], shard.rows), prepared.gamma_per_row.clone())
        if prepared.mask is not None:
            pieces[f"{name}.mask"] = Piece(shard, prepared.mask.clone())
    return pieces


def mask_pieces(stages: ModelChunks) -> Pieces:
    """The masks of the weights as they are, where N < M: most kernels keep the codes alone."""
    layers = stages.state.layers.items()
    return {
        f"{name}.mask": Piece(layer.weight_shard, layer_mask(layer, *layer.settings.sparsity))
        for name, layer in layers
        if layer.settings.sparsity[0] < layer.settings.sparsity[1] and layer.prepared.mask is None
    }


@contextmanager
def recorded_hidden_states(trainer: Trainer) -> Iterator[Pieces]:
    """Fills what it yields with this rank's part of the last norm's input, when the block ends."""
    pieces: Pieces = {}
    seen: list[Tensor] = []  # [tokens (/tp), micro-batch, hidden]
    last = list(trainer.stages.chunks)[-1]
    if not trainer.parallel.is_last_stage:
        yield pieces
        return
    norm = last.get_submodule("decoder.final_layernorm")
    hook = norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    yield pieces
    hook.remove()
    pieces["hidden"] = _tokens_piece(trainer, seen)


@contextmanager
def recorded_tokens(trainer: Trainer) -> Iterator[Pieces]:
    """Fills what it yields with the int8 activations and scales of every quantized layer, when the block ends.

    They are read from what layers keep for backward, so the block holds training steps. Layers of experts, whose
    tokens come in the router's order, are left out.
    """
    pieces: Pieces = {}
    kept: dict[str, list[tuple[Tensor, Tensor]]] = {}
    layers = {n: layer for n, layer in trainer.stages.state.layers.items() if ".experts." not in n}
    hooks = [hook for name, layer in layers.items() for hook in _keep_tokens(layer, kept.setdefault(name, []))]
    yield pieces
    for hook in hooks:
        hook.remove()
    for name, steps in kept.items():
        if not steps:
            continue
        tokens, scales = [x_q for x_q, _ in steps], [s_x.unsqueeze(-1) for _, s_x in steps]
        column = isinstance(layers[name], ColumnParallelLinear)
        pieces[f"{name}.x_q"] = _tokens_piece(trainer, tokens) if column else _features_piece(trainer, tokens)
        pieces[f"{name}.s_x"] = _tokens_piece(trainer, scales, cut=column)


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


def _tokens_piece(trainer: Trainer, seen: list[Tensor], cut: bool = True) -> Piece:
    """[tokens (/tp, if `cut`), micro-batch, width] of every micro-batch as a part of [batch, tokens, width]."""
    parallel = trainer.parallel
    local = torch.cat([t.transpose(0, 1) for t in seen])
    share = local.shape[1]
    cut = cut and parallel.sequence_parallel
    columns = (parallel.tensor.rank * share, share) if cut else (0, share)
    shape = (len(local) * parallel.data.size, share * (parallel.tensor.size if cut else 1), local.shape[2])
    return Piece(LogicalShard(shape, _batch_rows(trainer, len(local)), columns), local)


def _features_piece(trainer: Trainer, seen: list[Tensor]) -> Piece:
    """[tokens, micro-batch, width/tp] of every micro-batch as a part of [batch, width, tokens]."""
    parallel = trainer.parallel
    local = torch.cat([t.permute(1, 2, 0) for t in seen]).contiguous()
    share = local.shape[1]
    shape = (len(local) * parallel.data.size, share * parallel.tensor.size, local.shape[2])
    columns = (parallel.tensor.rank * share, share)
    return Piece(LogicalShard(shape, _batch_rows(trainer, len(local)), columns), local)


def _batch_rows(trainer: Trainer, share: int) -> tuple[tuple[int, int], ...]:
    """This replica's samples in the global batch."""
    return ((trainer.parallel.data.rank * share, share),)
