"""Ranks that hold the same piece of a weight hold the same bits, or the run stops before its first step."""

import pytest
import torch
from ranks import run_ranks
from training_runs import small_recipe

from megatron_sbn.errors import NumericalError
from megatron_sbn.model import build_model_chunks
from megatron_sbn.parallel import state as parallel_state
from megatron_sbn.parallel.cuda_shim import without_cuda
from megatron_sbn.parallel.replica_check import check_replicas

LAYER = "decoder.layers.1.mlp.linear_fc1.weight"
NORM = "decoder.final_layernorm.weight"
CASES = {
    "data": (2, (), LAYER, 1, "ranks 0 and 1"),
    "data4": (4, (), LAYER, 2, "ranks 0, 1, 3 and 2"),
    "tensor-norm": (2, ("parallel.tensor=2",), NORM, 1, "ranks 0 and 1"),
    "tied-stages": (
        2,
        ("parallel.pipeline=2", "model.share_embeddings_and_output_weights=true"),
        "embedding.word_embeddings.weight",
        1,
        "ranks 0 and 1",
    ),
    "second-stage": (4, ("parallel.pipeline=2",), "decoder.layers.3.mlp.linear_fc2.weight", 3, "ranks 2 and 3"),
}


def complaint(overrides: tuple[str, ...], name: str, rank: int, element: int) -> str:
    """What a rank raises after `rank` changed the last bit of one element; empty if all is well."""
    with without_cuda():
        recipe = small_recipe(overrides)
        parallel = parallel_state.initialize(recipe)
        parameters = build_model_chunks(recipe, parallel).parameters
        if parallel.rank == rank:
            weight = next(p.parameter for p in parameters if p.name == name).data.view(-1)
            weight[element] = torch.nextafter(weight[element], torch.tensor(9.0))
        message = ""
        try:
            check_replicas(parameters, parallel)
        except NumericalError as error:
            message = str(error)
        parallel_state.finalize()
    return message


@pytest.mark.parametrize("case", CASES)
def test_one_bit_names_the_parameter_and_the_ranks(case: str) -> None:
    world_size, overrides, name, rank, ranks = CASES[case]
    messages = run_ranks(complaint, world_size, overrides, name, rank, -1)
    assert all(f"differs between {ranks}, which" in message for message in messages)
    assert any(message.startswith(name) for message in messages)


def test_pieces_that_nobody_else_holds_may_have_any_value() -> None:
    assert run_ranks(complaint, 2, ("parallel.tensor=2",), LAYER, 1, 0) == ["", ""]
    assert run_ranks(complaint, 2, ("parallel.pipeline=2",), LAYER, 0, 0) == ["", ""]
