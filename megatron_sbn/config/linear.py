"""`linear` of a recipe: what the attention and MLP projections compute, and how that changes during training."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from megatron_sbn.config.values import (
    ActivationBits,
    NonNegative,
    NonNegativeFloat,
    Positive,
    Section,
    Sparsity,
    WeightFormat,
    as_tuple,
)


class Phase(Section):
    """From `step` on, the settings given here replace those of `linear` (None: unchanged)."""

    step: NonNegative
    """The optimizer step from which on it holds."""
    weight_format: WeightFormat | None = None
    """As in linear."""
    sparsity: Sparsity | None = None
    """As in linear."""
    activation_bits: ActivationBits | Literal["unchanged"] = "unchanged"
    """As in linear."""

    @property
    def changes(self) -> dict[str, Any]:
        """Settings of `linear` that are replaced, with their values."""
        given: dict[str, Any] = {"weight_format": self.weight_format, "sparsity": self.sparsity}
        changed = {key: value for key, value in given.items() if value is not None}
        # Here None is a value: no rounding.
        return changed if self.activation_bits == "unchanged" else changed | {"activation_bits": self.activation_bits}


ForwardForm = Literal[
    "auto", "dense", "planes", "wgmma", "cusparselt", "mma_sp", "sliding_cusparselt", "sliding_mma_sp"
]


class Linear(Section):
    """What the attention and MLP projections compute (docs/method.md)."""

    weight_format: WeightFormat = "ternary"
    """ternary, or dense: no quantization, of activations neither."""
    sparsity: Sparsity = (6, 8)
    """N:M along the input dimension; N = M is none."""
    activation_bits: ActivationBits = 8
    """8; 4 (QKV and FC1 inputs only); none."""
    order: Literal["quant_then_mask", "mask_then_quant"] = "quant_then_mask"
    """mask_then_quant takes gamma over the survivors of the mask."""
    mask_source: Literal["latent", "quantized"] = "latent"
    """The mask from |W|, or from the codes (known to collapse)."""
    masked_gradient: Literal["dense", "masked"] = "dense"
    """Whether pruned weights get a gradient (dense) or none (masked)."""
    sr_ste_decay: NonNegativeFloat = 0.0
    """SR-STE: adds this times (1 - mask) W to the gradient."""
    backward: Literal["exact", "int8_dgrad", "int8"] = "exact"
    """exact; or dY quantized to int8 for dX (int8_dgrad), for both GEMMs (int8)."""
    backend: Literal["auto", "cpu", "triton", "reference"] = "auto"
    """Who computes: auto is cpu on CPU and triton on CUDA."""
    forward_form: ForwardForm = "auto"
    """How the forward product reads the codes on CUDA; auto: the fastest that was measured."""
    mask_interval: Positive = 1
    """Steps between mask updates."""
    mask_freeze_step: NonNegative | None = None
    """Masks stay as they are from this step on."""
    phases: Annotated[tuple[Phase, ...], BeforeValidator(as_tuple)] = ()
    """Changes of weight_format, sparsity or activation_bits from a step on."""

    def at(self, step: int) -> "Linear":
        """The settings in force at an optimizer step: these, changed by every phase that has begun."""
        return self.in_order()[sum(phase.step <= step for phase in self.phases)]

    @property
    def final(self) -> "Linear":
        """The settings at the end, after all phases: what a run's result is of."""
        return self.in_order()[-1]

    @property
    def label(self) -> str:
        """Format and N:M before any phase: ternary 6:8."""
        return f"{self.weight_format} {self.sparsity[0]}:{self.sparsity[1]}"

    @property
    def schedule(self) -> str:
        """The phases in words: dense 8:8 -> ternary 6:8 at step 200; empty where there are none."""
        settings = self.in_order()
        words = [settings[0].label] if self.phases else []
        for before, after, phase in zip(settings, settings[1:], self.phases, strict=False):
            changed = [after.label] if after.label != before.label else []
            if after.activation_bits != before.activation_bits:
                changed.append(f"{after.activation_bits or 'no'}-bit activations")
            words.append(f"{', '.join(changed) or after.label} at step {phase.step}")
        return " -> ".join(words)

    def in_order(self) -> tuple["Linear", ...]:
        """The settings before any phase, then those from each phase on. None of them has phases."""
        settings = [self.model_copy(update={"phases": ()})]
        for phase in self.phases:
            settings.append(settings[-1].model_copy(update=phase.changes))
        return tuple(settings)


def plain_linear(linear: dict[str, Any]) -> dict[str, Any]:
    """N:M as '6:8' and no-bits as 'none', the way people write them."""

    def plain(key: str, value: Any) -> Any:  # noqa: ANN401 - anything that YAML can hold
        if key == "sparsity" and value is not None:
            return f"{value[0]}:{value[1]}"
        return "none" if key == "activation_bits" and value is None else value

    phases = [{key: plain(key, value) for key, value in phase.items()} for phase in linear["phases"]]
    return {key: plain(key, value) for key, value in linear.items()} | {"phases": phases}
