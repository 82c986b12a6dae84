"""gamma, masks and codes of all layers, once per optimizer step (docs/method.md, section 4).

W changes only in the optimizer step, so what is derived from it is made right after, and serves every micro-batch,
recomputation and evaluation until the next. All layers share one MAX and one SUM all-reduce over the tensor-parallel
group: the maxima of all parts in one vector, then their fixed-point sums in another, which makes every gamma
independent of how its rows or columns are cut.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import sbn_kernels
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sbn.config import Linear, Phase
from megatron_sbn.errors import NumericalError
from megatron_sbn.functional import LinearSettings, PreparedWeight
from megatron_sbn.layers.linear import NOT_PREPARED, SparseBitLinear


def settings_at(linear: Linear, step: int, micro_batches: int = 1) -> LinearSettings:
    """The arithmetic in force at an optimizer step: the recipe's, changed by every phase begun by then.

    SR-STE's decay is added in every backward pass, so each of a step's `micro_batches` gets its share.
    """
    values = linear.model_dump(exclude={"mask_interval", "mask_freeze_step", "phases"})
    for phase in linear.phases:
        if phase.step <= step:
            values |= _changes(phase)
    # What only quantised arithmetic has a meaning for rests while a phase is without it.
    if values["weight_format"] == "dense":
        values |= {"order": "quant_then_mask", "mask_source": "latent", "backward": "exact"}
    elif values["activation_bits"] is None:
        values["backward"] = "exact"
    values["sr_ste_decay"] = linear.sr_ste_decay / micro_batches
    return LinearSettings(**values)


def _changes(phase: Phase) -> dict[str, object]:
    changes: dict[str, object] = {}
    if phase.weight_format is not None:
        changes["weight_format"] = phase.weight_format
    if phase.sparsity is not None:
        changes["sparsity"] = phase.sparsity
    if phase.activation_bits != "unchanged":
        changes["activation_bits"] = phase.activation_bits
    return changes


@dataclass(frozen=True)
class _Part:
    """One logical matrix within a layer's weight: this rank's rows of it, and its global number of terms."""

    layer: str
    rows: Tensor  # int64 [rows]
    count: int


class TernaryState:
    """Prepares every layer of one pipeline stage.

    Args:
        layers: Sparse-BitNet linears by global name, in an order that all ranks of `group` share.
        linear: the recipe's section.
        group: the tensor-parallel group.
        micro_batches: backward passes of this rank in one optimizer step.
    """

    def __init__(
        self, layers: Mapping[str, SparseBitLinear], linear: Linear, group: dist.ProcessGroup, micro_batches: int = 1
    ) -> None:
        self.layers = dict(layers)
        self.linear = linear
        self.group = group
        self.micro_batches = micro_batches
        self.preparations = 0
        self._masks: dict[str, Tensor] = {}
        self._mask_sparsity: tuple[int, int] | None = None

    def prepare(self, step: int) -> None:
        """Makes gamma, mask and codes of every layer for optimizer step `step`. Raises NumericalError on NaN or Inf."""
        settings = settings_at(self.linear, step, self.micro_batches)
        for layer in self.layers.values():
            # 4 bits are for the inputs of QKV and FC1 only.
            wide = settings.activation_bits == 4 and not layer.narrow_input
            layer.settings = replace(settings, activation_bits=8) if wide else settings
        n, m = settings.sparsity
        masks = self._masks_for(step, settings)
        if settings.weight_format == "dense" and n == m:
            for layer in self.layers.values():
                layer.prepared = NOT_PREPARED
            return
        self.preparations += 1
        gammas = self._gammas(settings, masks) if settings.weight_format == "ternary" else {}
        for name, layer in self.layers.items():
            layer.prepared = self._prepare_layer(layer, settings, gammas.get(name), masks.get(name))
            if self._keeps_masks(settings):
                mask = layer.prepared.mask
                assert mask is not None
                self._masks[name] = mask

    def mask_state(self) -> dict[str, Tensor]:
        """Packed masks by layer name, when they are not a function of the current weights; else empty."""
        return {name: sbn_kernels.pack_mask(mask) for name, mask in self._masks.items()}

    def load_mask_state(self, state: Mapping[str, Tensor], step: int) -> None:
        """Takes back what `mask_state` gave after `step` steps."""
        for name, packed in state.items():
            weight = self.layers[name].weight
            self._masks[name] = sbn_kernels.unpack_mask(packed, weight.shape[1]).to(weight.device)
        self._mask_sparsity = settings_at(self.linear, step).sparsity if state else None

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

    def _prepare_layer(
        self, layer: SparseBitLinear, settings: LinearSettings, gamma: Tensor | None, mask: Tensor | None
    ) -> PreparedWeight:
        n, m = settings.sparsity
        weight = layer.weight.detach()
        needs_mask = settings.needs_mask or self._keeps_masks(settings)
        if gamma is None:
            if mask is None:
                mask = sbn_kernels.nm_mask(weight, n, m, backend=settings.backend)
            return PreparedWeight(mask=mask)
        codes, kept = sbn_kernels.codes_from_gamma(
            weight,
            gamma,
            n,
            m,
            mask_source=settings.mask_source,
            mask=mask,
            with_mask=needs_mask,
            backend=settings.backend,
        )
        return PreparedWeight(codes=codes, gamma_per_row=gamma, mask=kept)

    def _gammas(self, settings: LinearSettings, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """gamma of every row of every layer, fp32 [out], from one MAX and one SUM over the group."""
        parts = [part for name, layer in self.layers.items() for part in _parts(name, layer, self.group.size())]
        pieces = [self.layers[part.layer].weight.detach()[part.rows] for part in parts]
        maxima = torch.stack([sbn_kernels.part_abs_max(piece) for piece in pieces])
        dist.all_reduce(maxima, dist.ReduceOp.MAX, group=self.group)
        for part, finite in zip(parts, maxima.isfinite().tolist(), strict=True):
            if not finite:
                error = NumericalError(f"{part.layer}.weight holds NaN or Inf; resume from the last good checkpoint")
                error.on_every_rank = False  # other pipeline stages do not see it, and rank 0 may be one of those
                raise error
        n, m = settings.sparsity
        survivors = settings.order == "mask_then_quant" and n < m
        counts = [part.count * n // m if survivors else part.count for part in parts]
        count = torch.tensor(counts, dtype=torch.int64, device=maxima.device)
        units = sbn_kernels.unit_exponent(maxima, count)
        totals = torch.stack(
            [
                sbn_kernels.fixed_point_sum(
                    piece, unit, self._survivors(part, piece, masks, n, m) if survivors else None
                )
                for part, piece, unit in zip(parts, pieces, units, strict=True)
            ]
        )
        dist.all_reduce(totals, dist.ReduceOp.SUM, group=self.group)
        gammas = sbn_kernels.gamma_from_fixed_point(totals, units, count)
        per_row = {name: torch.empty(len(layer.weight), device=maxima.device) for name, layer in self.layers.items()}
        for part, gamma in zip(parts, gammas, strict=True):
            per_row[part.layer][part.rows] = gamma
        return per_row

    @staticmethod
    def _survivors(part: _Part, piece: Tensor, masks: Mapping[str, Tensor], n: int, m: int) -> Tensor:
        kept = masks.get(part.layer)
        return kept[part.rows] if kept is not None else sbn_kernels.nm_mask(piece, n, m)


def _parts(name: str, layer: SparseBitLinear, group_size: int) -> list[_Part]:
    """The parts of a layer. Rows or columns are cut equally, so a part's global count is its local one times tp."""
    columns = layer.weight.shape[1]
    parts = []
    for ranges in layer.part_rows:
        rows = torch.cat([torch.arange(start, start + length) for start, length in ranges])
        parts.append(_Part(name, rows.to(layer.weight.device), len(rows) * columns * group_size))
    return parts
