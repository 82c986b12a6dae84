"""Arguments of a linear layer: what Megatron-Core hands over and is not used is listed, anything else is an error."""

from types import SimpleNamespace

import pytest

from megatron_sbn.layers.linear import IGNORED_AT_CONSTRUCTION, ColumnParallelLinear, RowParallelLinear

GIVEN = {"config": None, "tp_group": None, "bias": False}


@pytest.mark.parametrize("given", [{"gather": True}, {"tp_comm_overlap": 1, "init_method": None}])
def test_an_argument_of_another_megatron_core_is_an_error(given: dict[str, object]) -> None:
    name = next(name for name in given if name not in IGNORED_AT_CONSTRUCTION)
    with pytest.raises(TypeError, match=f"unknown to Sparse-BitNet's linear layers: {name}; another Megatron-Core"):
        ColumnParallelLinear(8, 8, **GIVEN, **given)
    with pytest.raises(TypeError, match=name):
        RowParallelLinear(8, 8, input_is_parallel=True, **GIVEN, **given)
    with pytest.raises(TypeError, match=name):
        ColumnParallelLinear.forward(SimpleNamespace(), None, **given)
