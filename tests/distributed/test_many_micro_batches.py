"""Gradients of 256 micro-batches: the sum that reaches ZeRO, against fp64, and what a sum in bf16 would have been."""

import pytest
import torch
from ranks import run_ranks
from torch import Tensor
from training_runs import batch_of, small_recipe, trainer_of

from megatron_sbn.doctor.logical_tensors import relative
from megatron_sbn.doctor.recorder import gradient_shards

MICRO_BATCHES = 256
TINY = (
    "model.num_layers=1", "model.hidden_size=32", "model.ffn_hidden_size=32", "model.num_attention_heads=2",
    "model.num_query_groups=1", "model.seq_length=8", "model.vocab_size=32", "training.micro_batch_size=1",
    f"training.global_batch_size={MICRO_BATCHES}", "model.bf16=true",
)  # fmt: skip


def accumulate(overrides: tuple[str, ...]) -> dict[str, tuple[Tensor, Tensor, Tensor, int]]:
    """Of every parameter: its accumulated gradient, the micro-batches' own summed in fp64 and in bf16, their number."""
    recipe = small_recipe((*TINY, *overrides))
    with trainer_of(recipe) as trainer:
        logical = {p.name: p.parameter for p in trainer.stages.parameters}
        exact = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in logical.items()}
        coarse = {name: torch.zeros_like(p, dtype=torch.bfloat16) for name, p in logical.items()}
        seen = dict.fromkeys(logical, 0)

        def add(name: str, gradient: Tensor) -> None:
            assert gradient.dtype == torch.float32
            exact[name] += gradient
            coarse[name] += gradient.bfloat16()
            seen[name] += 1

        for name, parameter in logical.items():
            parameter.register_hook(lambda gradient, name=name: add(name, gradient))
        accumulated: dict[str, Tensor] = {}
        finalize = trainer.stages.config.finalize_model_grads_func

        def finalize_and_record(*args: object, **kwargs: object) -> None:
            finalize(*args, **kwargs)
            accumulated.update({name: part.value for name, part in gradient_shards(trainer.stages).items()})

        trainer.stages.config.finalize_model_grads_func = finalize_and_record
        trainer.step(0, batch_of(recipe, 0))
        return {name: (accumulated[name], exact[name], coarse[name], seen[name]) for name in logical}


@pytest.mark.parametrize("overrides", [(), ("linear.weight_format=dense",)], ids=["ternary", "dense"])
def test_256_micro_batches_add_up_in_fp32(overrides: tuple[str, ...]) -> None:
    (parameters,) = run_ranks(accumulate, 1, overrides)
    assert len(parameters) >= 9
    for name, (ours, exact, coarse, seen) in parameters.items():
        assert seen == MICRO_BATCHES, name
        assert relative(ours, exact) < 1e-5, name
        assert relative(coarse, exact) > 1e-3, name
