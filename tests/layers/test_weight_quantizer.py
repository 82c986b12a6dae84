"""settings_at: which arithmetic is in force at a step."""

import pytest

from megatron_sbn.config import Linear
from megatron_sbn.functional.settings import LinearSettings
from megatron_sbn.layers.weight_quantizer import settings_at


def linear(**values: object) -> Linear:
    return Linear.model_validate(values)


def test_without_phases_it_is_the_recipe() -> None:
    assert settings_at(linear(), 0) == settings_at(linear(), 10**9) == LinearSettings()
    given = linear(
        sparsity="4:8", activation_bits=4, masked_gradient="masked", backward="int8", order="mask_then_quant"
    )
    assert settings_at(given, 7) == LinearSettings(
        sparsity=(4, 8), activation_bits=4, masked_gradient="masked", backward="int8", order="mask_then_quant"
    )


def test_phases_change_what_they_name_from_their_step_on() -> None:
    annealed = linear(
        sparsity="8:8",
        phases=[
            {"step": 10, "sparsity": "6:8"},
            {"step": 20, "activation_bits": "none"},
            {"step": 30, "sparsity": "4:8", "activation_bits": 4},
            {"step": 40, "weight_format": "dense"},
        ],
    )
    seen = [settings_at(annealed, step) for step in (0, 9, 10, 19, 20, 30, 39, 40, 1000)]
    assert [s.sparsity for s in seen] == [(8, 8), (8, 8), (6, 8), (6, 8), (6, 8), (4, 8), (4, 8), (4, 8), (4, 8)]
    assert [s.activation_bits for s in seen] == [8, 8, 8, 8, None, 4, 4, 4, 4]
    assert [s.weight_format for s in seen] == ["ternary"] * 7 + ["dense"] * 2


@pytest.mark.parametrize(
    ("values", "rested"),
    [
        (
            {"weight_format": "dense", "order": "mask_then_quant", "backward": "int8"},
            ("quant_then_mask", "latent", "exact"),
        ),
        ({"activation_bits": None, "backward": "int8_dgrad"}, ("quant_then_mask", "latent", "exact")),
        ({"mask_source": "quantized", "backward": "int8"}, ("quant_then_mask", "quantized", "int8")),
    ],
    ids=str,
)
def test_what_has_no_meaning_rests(values: dict[str, object], rested: tuple[str, str, str]) -> None:
    settings = settings_at(linear(**values), 0)
    assert (settings.order, settings.mask_source, settings.backward) == rested


def test_sr_ste_is_shared_by_the_micro_batches() -> None:
    assert settings_at(linear(sr_ste_decay=0.6), 0, micro_batches=3).sr_ste_decay == pytest.approx(0.2)
