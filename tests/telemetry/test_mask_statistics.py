"""Telemetry against counts made with numpy loops over groups, for every format that has its own rules."""

import numpy as np
import pytest
import torch

from megatron_sbn.config import Linear, Phase
from megatron_sbn.errors import CheckpointError
from megatron_sbn.layers.weight_quantizer import WeightQuantizer
from megatron_sbn.telemetry.mask_statistics import Telemetry


def made(layers, parallel, **linear):
    state = WeightQuantizer(layers, Linear(**linear), parallel.tensor.group)
    return state, Telemetry(state, parallel)


def keep(magnitudes, n, m):
    """N:M mask by sorting each group; a stable sort keeps the lower index on a tie."""
    mask = np.zeros(magnitudes.shape, dtype=bool)
    for row in range(magnitudes.shape[0]):
        for start in range(0, magnitudes.shape[1], m):
            order = np.argsort(-magnitudes[row, start : start + m], kind="stable")[:n]
            mask[row, start + order] = True
    return mask


def rounded(layer):
    """Codes before masking, from the layer's own scales."""
    scale = np.float32(1) / layer.prepared.gamma_per_row.numpy()
    return np.clip(np.rint(layer.weight.detach().numpy() * scale[:, None]), -1, 1)


def count(layers, n, m, source="latent"):
    """(weights, zeros, natural zeros, dead groups, masks by name) of ternary layers."""
    totals, masks = np.zeros(4, dtype=np.int64), {}
    for name, layer in layers.items():
        codes = rounded(layer)
        base = np.abs(layer.weight.detach().numpy() if source == "latent" else codes)
        masks[name] = keep(base, n, m)
        final = codes * masks[name]
        dead = sum(not final[r, s : s + m].any() for r in range(len(final)) for s in range(0, final.shape[1], m))
        totals += [final.size, (final == 0).sum(), (codes == 0).sum(), dead]
    return (*totals.tolist(), masks)


def shake(layers, seed, size=0.01):
    generator = torch.Generator().manual_seed(seed)
    for layer in layers.values():
        layer.weight.data += torch.randn(layer.weight.shape, generator=generator) * size


def differing(a, b):
    return sum(int((a[name] != b[name]).sum()) for name in a)


@pytest.mark.parametrize(("n", "m"), [(6, 8), (2, 4), (1, 6), (5, 8)])
@pytest.mark.parametrize("source", ["latent", "quantized"])
def test_ternary_counts_and_flips(layers, parallel, n, m, source):
    state, telemetry = made(layers, parallel, sparsity=(n, m), mask_source=source)
    previous, total_flips = None, 0
    for step in (0, 100, 200):
        state.prepare(step)
        values = telemetry.measure(step)
        weights, zeros, natural, dead, masks = count(layers, n, m, source)
        assert values["zero_fraction"] == zeros / weights
        assert values["natural_zero_fraction"] == natural / weights
        assert values["pruned_nonzero_fraction"] == (zeros - natural) / weights
        assert values["dead_group_fraction"] == dead / (weights // m)
        if previous is None:
            assert "flip_rate" not in values
        else:
            flips = differing(previous, masks)
            assert flips > 0
            total_flips += flips
            assert values["flip_rate"] == flips / weights
        assert values["flip_rate_cumulative"] == total_flips / weights
        previous = masks
        shake(layers, step)


def test_a_gaussian_has_31_percent_natural_zeros(layers, parallel):
    """P(|w| < E|w| / 2) of a Gaussian is 0.310 (docs/metrics.md, "Ternary weights and masks")."""
    for layer in layers.values():
        layer.weight = torch.nn.Parameter(torch.randn(240, 480, generator=torch.Generator().manual_seed(3)))
    state, telemetry = made(layers, parallel)
    state.prepare(0)
    assert telemetry.measure(0)["natural_zero_fraction"] == pytest.approx(0.310, abs=0.004)


def test_dead_groups_are_counted(layers, parallel):
    layer = layers["decoder.layers.0.column"]
    layer.weight.data[3, 8:16] = 1e-6
    layer.weight.data[4, 0:8] = 0.0
    state, telemetry = made({"only": layer}, parallel)
    state.prepare(0)
    assert telemetry.measure(0)["dead_group_fraction"] == 2 / (18 * 3)


def test_ternary_without_sparsity_has_zeros_and_no_flips(layers, parallel):
    state, telemetry = made(layers, parallel, sparsity=(8, 8))
    state.prepare(0)
    values = telemetry.measure(0)
    natural = sum(int((rounded(layer) == 0).sum()) for layer in layers.values())
    weights = sum(layer.weight.numel() for layer in layers.values())
    assert values == {
        "zero_fraction": natural / weights,
        "natural_zero_fraction": natural / weights,
        "pruned_nonzero_fraction": 0.0,
    }


def test_dense_has_only_exact_zeros(layers, parallel):
    layers["decoder.layers.0.column"].weight.data[0, :5] = 0.0
    state, telemetry = made(layers, parallel, weight_format="dense", sparsity=(8, 8))
    state.prepare(0)
    assert telemetry.measure(0) == {"zero_fraction": 5 / sum(layer.weight.numel() for layer in layers.values())}


def test_sparse_dense_has_flips_and_the_zeros_of_its_mask(layers, parallel):
    state, telemetry = made(layers, parallel, weight_format="dense", sparsity=(6, 8))
    before = {name: keep(np.abs(layer.weight.detach().numpy()), 6, 8) for name, layer in layers.items()}
    weights = sum(mask.size for mask in before.values())
    state.prepare(0)
    assert telemetry.measure(0) == {
        "zero_fraction": 0.25,
        "dead_group_fraction": 0.0,
        "flip_rate_cumulative": 0.0,
    }
    shake(layers, 1)
    layers["decoder.layers.1.row"].weight.data[2, 8:16] = 0.0  # kept ones among them are zeros of mask * W too
    state.prepare(1)
    after = {name: keep(np.abs(layer.weight.detach().numpy()), 6, 8) for name, layer in layers.items()}
    flips = differing(before, after)
    assert telemetry.measure(1) == {
        "zero_fraction": (weights // 4 + 6) / weights,
        "dead_group_fraction": 1 / (weights // 8),
        "flip_rate": flips / weights,
        "flip_rate_cumulative": flips / weights,
    }


def test_masks_that_are_kept_are_the_ones_measured(layers, parallel):
    state, telemetry = made(layers, parallel, mask_interval=10)
    state.prepare(0)
    telemetry.measure(0)
    shake(layers, 1)
    state.prepare(5)  # weights moved, masks did not
    values = telemetry.measure(5)
    assert values["flip_rate"] == 0.0
    zeros = sum(int((layer.prepared.codes == 0).sum()) for layer in layers.values())
    assert values["zero_fraction"] == zeros / sum(layer.weight.numel() for layer in layers.values())
    state.prepare(10)
    assert telemetry.measure(10)["flip_rate"] > 0.0


def test_a_change_of_sparsity_is_no_flip(layers, parallel):
    phases = (Phase(step=2, sparsity="4:8"), Phase(step=4, sparsity="8:8"), Phase(step=5, sparsity="4:8"))
    state, telemetry = made(layers, parallel, phases=phases)
    seen = {}
    for step in range(7):
        state.prepare(step)
        seen[step] = telemetry.measure(step)
        shake(layers, step)
    assert [step for step in seen if "flip_rate" in seen[step]] == [1, 3, 6]
    rates = [seen[step]["flip_rate"] for step in (1, 3, 6)]
    assert seen[5]["flip_rate_cumulative"] == pytest.approx(sum(rates[:2]), rel=1e-12)
    assert seen[6]["flip_rate_cumulative"] == pytest.approx(sum(rates), rel=1e-12)
    assert "flip_rate_cumulative" not in seen[4]


def test_a_resumed_run_measures_the_same(layers, parallel):
    weights = {name: layer.weight.detach().clone() for name, layer in layers.items()}

    def run(telemetry, state, steps):
        results = []
        for step in steps:
            for name, layer in layers.items():
                layer.weight.data.copy_(weights[name])
            shake(layers, step, 0.02)
            state.prepare(step)
            results.append(telemetry.measure(step))
        return results

    state, whole = made(layers, parallel)
    expected = run(whole, state, (0, 1, 2, 3))
    state, first = made(layers, parallel)
    assert first.counters() is None
    assert first.references() == {}
    run(first, state, (0, 1))
    counters, references = first.counters(), first.references()
    assert references.keys() == layers.keys()
    assert sum(packed.numel() for packed in first._references.values()) == (24 * 18 + 48 * 30 + 72 * 10) // 8
    run(first, state, (2,))  # goes on after the checkpoint and is lost
    state, second = made(layers, parallel)
    second.take(counters, references)
    assert run(second, state, (2, 3)) == expected[2:]
    assert expected[3]["flip_rate"] > 0


def test_state_that_does_not_fit_is_refused(layers, parallel):
    state, telemetry = made(layers, parallel)
    telemetry.forget()
    state.prepare(0)
    telemetry.measure(0)
    some = {name: mask for name, mask in telemetry.references().items() if "row" not in name}
    with pytest.raises(CheckpointError, match="telemetry"):
        made(layers, parallel)[1].take(telemetry.counters(), some)
    with pytest.raises(ValueError, match="before step 0"):
        telemetry.measure(-1)
