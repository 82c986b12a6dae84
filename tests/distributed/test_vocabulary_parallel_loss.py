"""Vocabulary-parallel loss on 2 ranks, with and without sequence parallelism, against one process in fp64."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import run_ranks
from torch import Tensor

from megatron_sbn.layers.collectives import ColumnParallelCollectives
from megatron_sbn.layers.loss import IGNORED, linear_cross_entropy

SEQUENCE, BATCH, HIDDEN, VOCABULARY = 6, 3, 16, 50


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(SEQUENCE, BATCH, HIDDEN, generator=generator)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator)
    labels = torch.randint(0, VOCABULARY, (SEQUENCE, BATCH), generator=generator)
    labels[2, 1] = IGNORED
    return hidden, weight, labels


def on_a_rank(sequence_parallel: bool, uniform: bool) -> tuple[Tensor, Tensor, Tensor]:
    group = dist.group.WORLD
    hidden, weight, labels = inputs()
    if sequence_parallel:
        hidden = hidden.chunk(2)[group.rank()]
    hidden, weight = hidden.clone().requires_grad_(), weight.chunk(2)[group.rank()].clone().requires_grad_()
    layout = ColumnParallelCollectives(group, sequence_parallel)
    losses = linear_cross_entropy(hidden, weight, labels, group=group, layout=layout, uniform_gradient=uniform)
    losses.mean().backward()
    return losses.detach(), hidden.grad, weight.grad


def test_losses_and_gradients_are_those_of_one_process() -> None:
    hidden, weight, labels = inputs()
    h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    expected = F.cross_entropy((h @ w.t()).flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED)
    expected.mean().backward()
    for sequence_parallel in (False, True):
        for uniform in (True, False):
            (first, dh0, dw0), (second, dh1, dw1) = run_ranks(on_a_rank, 2, sequence_parallel, uniform)
            assert torch.equal(first, second)
            torch.testing.assert_close(first.double(), expected.detach(), rtol=1e-6, atol=1e-6)
            dh = torch.cat([dh0, dh1]) if sequence_parallel else dh0
            torch.testing.assert_close(dh.double(), h.grad, rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(torch.cat([dw0, dw1]).double(), w.grad, rtol=1e-5, atol=1e-7)
            if not sequence_parallel:
                assert torch.equal(dh0, dh1)
