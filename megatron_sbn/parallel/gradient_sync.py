"""Gradient sums that neither the backward pass nor ZeRO makes, once per step, before ZeRO reduces over data parallel.

Two kinds of replicas see only a part of the gradient each:

* norm and router weights under sequence parallelism see this rank's tokens: SUM over the tensor group;
* tied embeddings under pipeline parallelism: the first stage has the lookup's, the last the head's: SUM of the two.

An expert's gradient covers the tokens of all ranks of its expert-parallel group. Its sum over replicas has to be
divided by the data-parallel size, like every gradient, while ZeRO divides by the number of replicas,
tensor * data / expert: what is left is the factor tensor / expert. Experts that saw no token get zeros.

Megatron-Core's own finalisation does the same inside its DDP wrapper, which DeepSpeed replaces. It is called through
`config.finalize_model_grads_func` at the end of Megatron-Core's schedules, while gradients are still whole.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state as megatron_state
from torch import Tensor, nn

from megatron_sbn.parallel.state import ParallelState


def make_finalizer(
    parameters: Iterable[nn.Parameter],
    parallel: ParallelState,
    tied_embedding: nn.Parameter | None,
    experts: Sequence[nn.Parameter] = (),
) -> Callable[..., None]:
    """The function that Megatron-Core's schedules call after the last backward pass of a step.

    `tied_embedding` is this rank's copy of an embedding that is the head too (first and last stage), else None;
    `experts` are those of the parameters that belong to experts.
    """
    share = parallel.tensor.size / parallel.expert.size
    partial = [parameter for parameter in parameters if is_token_partial(parameter)]

    def finalize(_model: list[nn.Module], _num_tokens: Tensor | None = None, **_: object) -> None:
        if partial and parallel.tensor.size > 1:
            _sum_coalesced(partial, parallel.tensor.group)
        if tied_embedding is not None and parallel.pipeline.size > 1:
            dist.all_reduce(_gradient(tied_embedding), group=megatron_state.get_embedding_group())
        for expert in experts:
            _gradient(expert).mul_(share)

    return finalize


def is_token_partial(parameter: nn.Parameter) -> bool:
    """Whether this rank's gradient covers its own tokens only (set by layers under sequence parallelism)."""
    return bool(vars(parameter).get("sequence_parallel", False))


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _sum_coalesced(parameters: Sequence[nn.Parameter], group: dist.ProcessGroup) -> None:
    """One all-reduce for all of them."""
    gradients = [_gradient(p) for p in parameters]
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat, group=group)
    for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))
