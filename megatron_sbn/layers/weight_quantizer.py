"""gamma, masks and codes of all layers, once per optimizer step (docs/method.md, "Once per optimizer step").

W changes only in the optimizer step, so what is derived from it is made right after, and serves every micro-batch,
recomputation and evaluation until the next. Scales come first, of all layers together (weight_scales.py), then codes.
The ranks that hold parts of a weight are the tensor-parallel group, and under ZeRO-3 its data-parallel replicas too:
then whole weights are gathered one layer at a time, for their codes.
"""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace

import sbn_kernels
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_sbn.config import Linear
from megatron_sbn.errors import InputError
from megatron_sbn.functional import LinearSettings, PreparedWeight
from megatron_sbn.functional.weight_handle import LocalWeight
from megatron_sbn.layers.linear import NOT_PREPARED, SparseBitLinear
from megatron_sbn.layers.weight_scales import layer_mask, row_scales
from megatron_sbn.parallel.shard import is_expert


def settings_at(linear: Linear, step: int, micro_batches: int = 1) -> LinearSettings:
    """The arithmetic in force at an optimizer step.

    SR-STE's decay is added in every backward pass, so each of a step's `micro_batches` gets its share.
    """
    values = linear.at(step).model_dump(exclude={"mask_interval", "mask_freeze_step", "phases"})
    # What only quantized arithmetic has a meaning for rests while a phase is without it.
    if values["weight_format"] == "dense":
        values |= {"order": "quant_then_mask", "mask_source": "latent", "backward": "exact"}
    elif values["activation_bits"] is None:
        values["backward"] = "exact"
    values["sr_ste_decay"] = linear.sr_ste_decay / micro_batches
    return LinearSettings(**values)


class WeightQuantizer:
    """Prepares every layer of one pipeline stage.

    Args:
        layers: Sparse-BitNet linears by global name, in an order that all ranks of `group` share.
        linear: the recipe's section.
        group: the tensor-parallel group.
        micro_batches: backward passes of this rank in one optimizer step.
        tokens: of one micro-batch, for which the form of the forward product is measured; dtype: of its activations.
        expert_tokens: those that an expert gets on average.
    """

    def __init__(
        self,
        layers: Mapping[str, SparseBitLinear],
        linear: Linear,
        group: dist.ProcessGroup,
        micro_batches: int = 1,
        tokens: int = 1,
        dtype: torch.dtype = torch.float32,
        expert_tokens: int = 1,
    ) -> None:
        self.layers = dict(layers)
        self.linear = linear
        self.group = group
        self.micro_batches = micro_batches
        self.tokens, self.expert_tokens, self.dtype = tokens, expert_tokens, dtype
        self.preparations = 0
        self._holders = group  # ranks that together hold each weight once
        self._masks: dict[str, Tensor] = {}
        self._mask_sparsity: tuple[int, int] | None = None

    def attach_weight(self, store: Callable[[nn.Parameter], LocalWeight], holders: dist.ProcessGroup) -> None:
        """Shards the weights further: `store` gives each its new place, `holders` together hold each weight once."""
        for layer in self.layers.values():
            layer.attach_weight(store(layer.weight))
        self._holders = holders

    def prepare(self, step: int) -> None:
        """Makes gamma, mask and codes of every layer for optimizer step `step`. Raises NumericalError on NaN or Inf."""
        settings = settings_at(self.linear, step, self.micro_batches)
        for layer in self.layers.values():
            # 4 bits are for the inputs of QKV and FC1 only.
            wide = settings.activation_bits == 4 and not layer.allows_4bit_input
            layer.settings = replace(settings, activation_bits=8) if wide else settings
        n, m = settings.sparsity
        masks = self._masks_for(step, settings)
        if settings.weight_format == "dense" and n == m:
            for layer in self.layers.values():
                layer.prepared = NOT_PREPARED
            return
        self.preparations += 1
        prepared = (
            self._ternary(settings, masks) if settings.weight_format == "ternary" else self._dense(settings, masks)
        )
        for name, layer in self.layers.items():
            layer.prepared = prepared[name]
            if self._keeps_masks(settings):
                mask = layer.prepared.mask
                assert mask is not None
                self._masks[name] = mask

    def kernels(self) -> dict[str, str]:
        """Which kernels serve the layers in force: "linear_qkv 1152 x 896" -> "cpu: forward ..."."""
        described = {}
        for name, layer in self.layers.items():
            settings, (out_features, in_features) = layer.settings, layer.store.shape
            if settings.quantizes_activations:
                assert layer.prepared.ternary is not None
                form, mode = layer.prepared.ternary.form, settings.backward
                tokens, device = self._tokens_of(name), layer.store.device
                served = sbn_kernels.served_by(settings.backend, form, mode, out_features, in_features, tokens, device)
            else:
                served = "torch: floating GEMMs"
            described[f"{name.rpartition('.')[2]} {out_features} x {in_features}"] = served
        return described

    def kept_masks(self) -> dict[str, Tensor]:
        """Masks by layer name, bool [out, in], when they are not a function of the current weights; else empty."""
        return dict(self._masks)

    @property
    def mask_sparsity(self) -> tuple[int, int] | None:
        """N and M of the kept masks; None where there are none."""
        return self._mask_sparsity if self._masks else None

    def load_masks(self, masks: Mapping[str, Tensor], sparsity: tuple[int, int] | None) -> None:
        """Takes back what `kept_masks` and `mask_sparsity` gave; without masks the next `prepare` makes them anew."""
        self._masks = dict(masks)
        self._mask_sparsity = sparsity if masks else None

    @property
    def _outlives_step(self) -> bool:
        return self.linear.mask_interval > 1 or self.linear.mask_freeze_step is not None

    def _keeps_masks(self, settings: LinearSettings) -> bool:
        return self._outlives_step and settings.sparsity[0] < settings.sparsity[1]

    def _masks_for(self, step: int, settings: LinearSettings) -> dict[str, Tensor]:
        """Masks that stay as they are at this step; empty when they are made anew."""
        freeze = self.linear.mask_freeze_step
        frozen = freeze is not None and step > freeze
        due = step % self.linear.mask_interval == 0 and not frozen
        if due or self._mask_sparsity != settings.sparsity or not self._keeps_masks(settings):
            self._masks = {}
            self._mask_sparsity = settings.sparsity
        return dict(self._masks)

    def _dense(self, settings: LinearSettings, masks: Mapping[str, Tensor]) -> dict[str, PreparedWeight]:
        """Masks of float weights."""
        n, m = settings.sparsity
        prepared = {}
        for name, layer in self.layers.items():
            mask = masks.get(name)
            if mask is None:
                mask = layer_mask(layer, n, m)
            prepared[name] = PreparedWeight(mask=mask)
        return prepared

    def _ternary(self, settings: LinearSettings, masks: Mapping[str, Tensor]) -> dict[str, PreparedWeight]:
        """Codes of all layers, and the form that the forward product of each reads."""
        n, m = settings.sparsity
        gammas = row_scales(self.layers, settings, masks, self._holders)
        forms = {name: self._form(layer, settings, self._tokens_of(name)) for name, layer in self.layers.items()}
        made: list[tuple[sbn_kernels.TernaryWeight, Tensor | None]] = []
        for names in self._batches():
            with contextlib.ExitStack() as gathered:
                made += sbn_kernels.quantize_weights(
                    [gathered.enter_context(self.layers[name].store.gathered()) for name in names],
                    [gammas[name] for name in names],
                    n,
                    m,
                    bounds=[_bounds(self.layers[name]) for name in names],
                    mask_source=settings.mask_source,
                    masks=[masks[name] for name in names] if masks else None,
                    with_mask=settings.needs_mask or self._keeps_masks(settings),
                    forms=[forms[name] for name in names],
                    backend=settings.backend,
                )
        return {name: PreparedWeight(*weight_and_mask) for name, weight_and_mask in zip(self.layers, made, strict=True)}

    def _batches(self) -> list[list[str]]:
        """Layers whose weights may be in memory together: all of them, or one where they have to be gathered."""
        names = list(self.layers)
        return [names] if self._holders is self.group else [[name] for name in names]

    def _tokens_of(self, name: str) -> int:
        """How many tokens a layer is given at once."""
        return self.expert_tokens if is_expert(name) else self.tokens

    def _form(self, layer: SparseBitLinear, settings: LinearSettings, tokens: int) -> str:
        """How the layer's forward product reads its codes."""
        if not settings.quantizes_activations:
            return "dense"
        if sbn_kernels.resolve(settings.backend, layer.store.device) != "triton":
            if settings.forward_form not in ("auto", "dense"):
                form = settings.forward_form
                raise InputError(f"linear.forward_form: {form!r} needs the triton backend; set it to 'auto'")
            return "dense"
        try:
            return sbn_kernels.choose_form(
                settings.forward_form, settings.sparsity, layer.store.shape, tokens, self.dtype, layer.store.device
            )
        except ValueError as error:
            raise InputError(f"linear.forward_form: {error}; choose another, or 'auto'") from None


def _bounds(layer: SparseBitLinear) -> tuple[int, ...]:
    """Where the runs of rows with one gamma begin, and the number of rows."""
    starts = sorted(start for ranges in layer.part_rows for start, length in ranges if length)
    return (*starts, layer.store.shape[0])
