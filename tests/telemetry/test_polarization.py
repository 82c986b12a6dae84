"""Histograms of W / gamma and of thresholds against numpy.histogram and sorted groups."""

import numpy as np
import pytest

from megatron_sbn.config import Linear
from megatron_sbn.layers.weight_quantizer import WeightQuantizer
from megatron_sbn.telemetry.polarization import polarization


def histogram(values, edges):
    inside = np.clip(values, edges[0], np.nextafter(edges[-1], 0))
    return np.histogram(inside, edges)[0]


@pytest.mark.parametrize("weight_format", ["ternary", "dense"])
@pytest.mark.parametrize("name", ["decoder.layers.0.gated", "decoder.layers.1.row"])
def test_against_numpy(layers, parallel, weight_format, name):
    layer = layers[name]
    layer.weight.data[0, :8] *= 30  # beyond the limits
    layer.weight.data[-1] *= 5  # parts of different scale
    WeightQuantizer(layers, Linear(weight_format=weight_format), parallel.tensor.group).prepare(0)
    result = polarization(layer, parallel.tensor.group, bins=60, limit=3.0)
    weight = layer.weight.detach().numpy().astype(np.float64)
    parts = 2 if "gated" in name else 1
    scales = np.abs(weight).reshape(parts, -1).mean(1).repeat(len(weight) // parts)
    if weight_format == "ternary":
        np.testing.assert_allclose(layer.prepared.gamma_per_row.numpy(), scales, rtol=1e-6)
        scales = layer.prepared.gamma_per_row.numpy().astype(np.float64)
    scaled = weight / scales[:, None]
    seventh = np.sort(np.abs(scaled).reshape(-1, 8))[:, 1]
    np.testing.assert_array_equal(result.edges, np.linspace(-3, 3, 61))
    np.testing.assert_array_equal(result.weights, histogram(scaled, result.edges))
    np.testing.assert_array_equal(result.thresholds, histogram(seventh, result.edges))
    assert result.weights.sum() == weight.size
    assert result.thresholds.sum() == weight.size // 8


def test_no_threshold_without_sparsity(layers, parallel):
    layer = layers["decoder.layers.1.row"]
    WeightQuantizer(layers, Linear(sparsity=(8, 8)), parallel.tensor.group).prepare(0)
    result = polarization(layer, parallel.tensor.group)
    assert not result.thresholds.any()
    assert result.weights.sum() == layer.weight.numel()


def test_bad_bins(layers, parallel):
    with pytest.raises(ValueError, match="bins = 0"):
        polarization(layers["decoder.layers.1.row"], parallel.tensor.group, bins=0)
