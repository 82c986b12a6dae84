"""LinearSettings and the checks of apply_linear: each mistake is named with its field, value and way out."""

import dataclasses
from types import NoneType
from typing import get_args

import pytest
import torch

from megatron_sbn.config import Linear
from megatron_sbn.functional import LinearSettings, PreparedWeight, apply_linear, prepare_weight, sparse_bitlinear
from megatron_sbn.functional.collectives import LocalCollectives


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight_format": "int4"}, "linear.weight_format: 'int4' is not one of: ternary, dense"),
        ({"activation_bits": 16}, "linear.activation_bits: 16 is not one of: 8, 4, None"),
        ({"order": "x"}, "linear.order: 'x' is not one of: quant_then_mask, mask_then_quant"),
        ({"mask_source": "x"}, "linear.mask_source: 'x' is not one of: latent, quantized"),
        ({"masked_gradient": "x"}, "linear.masked_gradient: 'x' is not one of: dense, masked"),
        ({"backward": "fp8"}, "linear.backward: 'fp8' is not one of: exact, int8_dgrad, int8"),
        ({"backend": "x"}, "linear.backend: 'x' is not one of: auto, cpu, triton, reference"),
        ({"sparsity": (9, 8)}, "linear.sparsity: sparsity 9:8 is not N:M with 1 <= N <= M <= 32"),
        ({"sparsity": (0, 8)}, "linear.sparsity: sparsity 0:8"),
        ({"sparsity": (6, 64)}, "linear.sparsity: sparsity 6:64"),
        ({"sparsity": (6,)}, "linear.sparsity: .* is not a pair"),
        ({"sr_ste_decay": -0.1}, "linear.sr_ste_decay: -0.1 must be finite"),
        ({"sr_ste_decay": float("nan")}, "linear.sr_ste_decay: nan must be finite"),
        (
            {"weight_format": "dense", "order": "mask_then_quant"},
            "linear.weight_format: dense weights are not quantized",
        ),
        (
            {"weight_format": "dense", "mask_source": "quantized"},
            "linear.weight_format: dense weights are not quantized",
        ),
        ({"order": "mask_then_quant", "mask_source": "quantized"}, "linear.order: 'mask_then_quant' needs mask_source"),
        ({"weight_format": "dense", "backward": "int8"}, "linear.backward: 'int8' needs ternary weights"),
        ({"activation_bits": None, "backward": "int8_dgrad"}, "linear.backward: 'int8_dgrad' needs ternary weights"),
    ],
    ids=str,
)
def test_impossible_settings_are_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinearSettings(**fields)


def choices(annotation: object) -> set[object]:
    """The values of a Literal or of a union with None; a type that is neither stands for itself."""
    parts = get_args(annotation)
    return {None} if annotation is NoneType else set().union(*map(choices, parts)) if parts else {annotation}


def test_a_recipe_has_the_same_settings_with_the_same_choices() -> None:
    for field in dataclasses.fields(LinearSettings):
        ours = Linear.model_fields[field.name]
        assert ours.default == field.default, field.name
        assert choices(ours.annotation) == choices(field.type), field.name


def test_defaults_are_those_of_the_paper_and_frozen() -> None:
    settings = LinearSettings()
    assert dataclasses.astuple(settings) == (
        *("ternary", (6, 8), 8, "quant_then_mask", "latent", "dense", 0.0, "exact"),
        *("auto", "auto"),
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.sparsity = (8, 8)


@pytest.mark.parametrize(
    ("fields", "needed"),
    [
        ({}, False),
        ({"masked_gradient": "masked"}, True),
        ({"sr_ste_decay": 0.1}, True),
        ({"weight_format": "dense"}, True),
        ({"weight_format": "dense", "sparsity": (8, 8)}, False),
        ({"masked_gradient": "masked", "sparsity": (8, 8)}, False),
    ],
    ids=str,
)
def test_the_mask_is_kept_only_where_it_is_used(fields: dict[str, object], needed: bool) -> None:
    settings = LinearSettings(**fields)
    assert settings.needs_mask is needed
    assert (prepare_weight(torch.randn(8, 16), None, settings).mask is not None) is needed


@pytest.mark.parametrize(
    ("x", "w", "arguments", "message"),
    [
        ((3, 15), (8, 16), {}, r"x has shape \(3, 15\), the weight takes \[..., 16\]"),
        ((), (8, 16), {}, r"x has shape \(\), the weight takes"),
        ((3, 16), (16,), {}, r"weight has shape \(16,\), expected \[out, in\]"),
        ((3, 12), (8, 12), {}, "in_features 12 is not a multiple of M = 8"),
        ((3, 16), (8, 16), {"splits": [4, 5]}, "splits .4, 5. must be positive row counts"),
        ((3, 16), (8, 16), {"bias": torch.ones(7)}, r"bias has shape \(7,\), the weight gives \[..., 8\]"),
        ((3, 16), (8, 16), {"weight_format": "dense", "splits": [4, 5]}, "splits .4, 5. must be positive"),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit_are_named(
    x: tuple[int, ...], w: tuple[int, ...], arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sparse_bitlinear(torch.ones(x), torch.ones(w), **arguments)


@pytest.mark.parametrize("weight_format", ["ternary", "dense"])
def test_nan_weights_are_refused(weight_format: str) -> None:
    w = torch.ones(8, 16)
    w[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or Inf"):
        sparse_bitlinear(torch.ones(1, 16), w, weight_format=weight_format)


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x has dtype torch\.float64: convert it"):
        sparse_bitlinear(torch.ones(1, 16, dtype=torch.float64), torch.ones(8, 16))


@pytest.mark.parametrize(
    ("made_with", "used_with"),
    [
        ({"weight_format": "dense"}, {}),
        ({}, {"weight_format": "dense"}),
        ({}, {"masked_gradient": "masked"}),
        ({}, {"sr_ste_decay": 0.1}),
    ],
    ids=str,
)
def test_a_weight_prepared_for_other_settings_is_refused(
    made_with: dict[str, object], used_with: dict[str, object]
) -> None:
    w = torch.randn(8, 16)
    prepared = prepare_weight(w, None, LinearSettings(**made_with))
    with pytest.raises(ValueError, match="prepared lacks"):
        apply_linear(torch.ones(1, 16), w, None, prepared, LinearSettings(**used_with), LocalCollectives())
    with pytest.raises(ValueError, match="prepared lacks"):
        apply_linear(torch.ones(1, 16), w, None, PreparedWeight(), LinearSettings(), LocalCollectives())
