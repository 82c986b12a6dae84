"""One optimizer step: the micro-batches of a global batch through Megatron-Core's schedule, then ZeRO's update.

    loss = mean over the global batch's tokens of cross-entropy, in fp32

The schedule divides by the number of micro-batches and ZeRO averages over data parallelism; micro-batches all have the
same number of tokens, so the mean of means is the mean. After the update gamma, masks and codes are prepared anew.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor

from megatron_sbn.config import Recipe
from megatron_sbn.model import ModelChunks, language_model_loss
from megatron_sbn.parallel.gradient_sync import make_finalizer
from megatron_sbn.parallel.replica_check import check_replicas
from megatron_sbn.parallel.state import ParallelState
from megatron_sbn.parallel.zero import Zero3Weight, ZeroOptimizer
from megatron_sbn.training.bad_steps import BadStepError, SpikeDetector
from megatron_sbn.training.schedule import learning_rate, weight_decay


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step gave, equal on every rank."""

    loss: float
    grad_norm: float
    lr: float
    weight_decay: float


class Trainer:
    """The model, its optimizer and its ternary state, on this rank.

    Args:
        tick: is called before every micro-batch.
    """

    def __init__(
        self, recipe: Recipe, parallel: ParallelState, stages: ModelChunks, tick: Callable[[], None] = lambda: None
    ) -> None:
        self.recipe = recipe
        self._get_on = tick
        self.parallel = parallel
        self.stages = stages
        parameters = [logical.parameter for logical in stages.parameters]
        experts = [logical.parameter for logical in stages.parameters if logical.is_expert]
        stages.config.finalize_model_grads_func = make_finalizer(parameters, parallel, stages.tied_embedding, experts)
        check_replicas(stages.parameters, parallel)  # while every weight is whole
        self.zero = ZeroOptimizer(stages.chunks, recipe, parallel)
        if self.zero.stage == 3:
            stages.state.attach_weight(Zero3Weight, parallel.tensor_data_group)
        for chunk in stages.chunks:
            if stages.tied_embedding is not None and chunk.post_process:
                self.zero.read_by(chunk.get_submodule("output_layer"), stages.tied_embedding)
        self.judge = SpikeDetector(recipe.training)
        self._schedule = get_forward_backward_func()

    def rows(self) -> list[int]:
        """Samples of a global batch that this rank's data-parallel replica takes, in order."""
        share = self.recipe.training.global_batch_size // self.parallel.data.size
        return list(range(self.parallel.data.rank * share, (self.parallel.data.rank + 1) * share))

    def step(self, step: int, samples: np.ndarray) -> StepResult:
        """Forward, backward, update with this replica's samples, int64 [global_batch / data ranks, tokens + 1].

        Raises BadStepError, naming step and rank, when loss or gradient norm is not finite or a spike (bad_steps.py):
        nothing is updated. Raises NumericalError where an updated weight is not finite.
        """
        with self.zero.accumulation():
            losses = [result["loss"] for result in self._run(samples, forward_only=False)]
        loss = self._mean_loss(losses)
        lr, decay = learning_rate(self.recipe, step), weight_decay(self.recipe, step)
        wrong = self.judge.loss(loss)

        def accept(norm: float) -> bool:
            nonlocal wrong
            wrong = wrong or self.judge.norm(norm)
            return not wrong

        norm = self.zero.step(lr, decay, accept)
        if wrong:
            raise BadStepError(step + 1, wrong + self._where(loss, norm, losses))
        self.judge.accept(loss, norm)
        self.stages.state.prepare(step + 1)
        return StepResult(loss, norm, lr, decay)

    def weights(self) -> dict[str, Tensor]:
        """This rank's parameters by global name: themselves, or copies in host memory where ZeRO-3 has to gather."""
        tensors = {}
        for logical in self.stages.parameters:
            with self.zero.gathered([logical.parameter]):
                whole = logical.parameter.data
                tensors[logical.name] = whole if self.zero.stage < 3 else whole.cpu().clone()
        return tensors

    def load_weights(self, put: Callable[[Tensor, str], None]) -> None:
        """Calls `put(parameter, global name)` for every parameter of this rank, which writes its value."""
        for logical in self.stages.parameters:
            with self.zero.gathered([logical.parameter], write=True):
                put(logical.parameter.data, logical.name)

    def evaluate(self, samples: np.ndarray) -> float:
        """Mean token loss over all replicas' samples; this one's are int64 [n, tokens + 1], n equal on every rank."""
        return self.evaluate_with_error(samples)[0]

    def evaluate_with_error(self, samples: np.ndarray) -> tuple[float, float | None]:
        """`evaluate`, and its standard error over all replicas' samples; None where there is one sample."""
        self.stages.chunks.eval()
        with torch.no_grad():
            results = self._run(samples, forward_only=True)
        self.stages.chunks.train()
        mean = self._mean_loss([result["loss"] for result in results])
        losses = torch.cat([result["samples"] for result in results]).double() if results else torch.empty(0)
        count, spread = self._sums(len(losses), float(((losses - mean) ** 2).sum()))
        return mean, math.sqrt(spread / (count - 1) / count) if count > 1 else None

    def _run(self, samples: np.ndarray, forward_only: bool) -> list[dict[str, Tensor]]:
        """Of each micro-batch on the last stage: "loss", a scalar, and without gradients "samples" [size]; all fp32."""
        size = min(self.recipe.training.micro_batch_size, len(samples))
        assert len(samples) % size == 0, "samples fill whole micro-batches"
        chunks = list(self.stages.chunks)
        results: list[dict[str, Tensor]] = self._schedule(
            forward_step_func=_forward_step,
            data_iterator=[self._micro_batches(samples, size) for _ in chunks],
            model=chunks,
            num_microbatches=len(samples) // size,
            seq_length=self.recipe.model.seq_length,
            micro_batch_size=size,
            forward_only=forward_only,
        )
        return results

    def _micro_batches(self, samples: np.ndarray, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(tokens, labels), int64 [size, tokens] each."""
        for start in range(0, len(samples), size):
            self._get_on()
            block = torch.from_numpy(samples[start : start + size]).to(self.parallel.device)
            yield block[:, :-1].contiguous(), block[:, 1:].contiguous()

    def _mean_loss(self, losses: list[Tensor]) -> float:
        """Mean over micro-batches and data parallelism, on every rank: the sums travel in fp64."""
        (total,) = self._sums(sum(float(loss) for loss in losses) / max(1, len(losses)))
        return total / self.parallel.data.size

    def _sums(self, *values: float) -> list[float]:
        """Each summed in fp64 over pipeline stages (all but the last give 0) and replicas, on every rank."""
        total = torch.tensor(values, dtype=torch.float64, device=self.parallel.device)
        dist.all_reduce(total, group=self.parallel.pipeline.group)
        dist.all_reduce(total, group=self.parallel.data.group)
        return [float(value) for value in total.tolist()]

    def _where(self, loss: float, norm: float, losses: list[Tensor]) -> str:
        """Names the ranks whose own losses are not finite, or says that none is; nothing where all is finite."""
        if np.isfinite(loss) and np.isfinite(norm):
            return ""
        bad = torch.zeros(self.parallel.world_size, dtype=torch.int64, device=self.parallel.device)
        bad[self.parallel.rank] = int(any(not torch.isfinite(loss) for loss in losses))
        dist.all_reduce(bad)
        ranks = [str(rank) for rank in bad.nonzero().flatten().tolist()]
        if ranks:
            return f" on rank {', '.join(ranks)}"
        return " on no single rank: the sum over ranks" if self.parallel.world_size > 1 else ""


def _forward_step(
    batches: Iterator[tuple[Tensor, Tensor]], chunk: GPTModel, *_: object
) -> tuple[Tensor, "partial[tuple[Tensor, dict[str, Tensor]]]"]:
    tokens, labels = next(batches)
    return language_model_loss(chunk, tokens, labels), partial(_mean_over_tokens)


def _mean_over_tokens(token_losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = token_losses.float().mean()
    result = {"loss": loss.detach().clone()}  # the schedule divides `loss` in place
    if not torch.is_grad_enabled():
        result["samples"] = token_losses.float().mean(dim=-1)
    return loss, result
