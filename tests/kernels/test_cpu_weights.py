"""Sorting networks that find one order statistic, and the cut between weights that round to 0 and to 1."""

import itertools

import pytest
import sbn_kernels as kernels
import torch
from same_bits import assert_same_bits
from sbn_kernels import reference
from sbn_kernels.cpu import weights
from sbn_kernels.cpu.weights import selection_network


def run(network: tuple[tuple[int, int, bool, bool], ...], values: list[int]) -> list[int]:
    out = list(values)
    for i, j, low, high in network:
        a, b = out[i], out[j]
        if low:
            out[i] = min(a, b)
        if high:
            out[j] = max(a, b)
    return out


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 8, 11])
def test_whole_networks_sort_every_row_of_zeros_and_ones(size: int) -> None:
    """The 0-1 principle: what sorts those sorts everything (Knuth, vol. 3, theorem 5.3.4Z)."""
    network = selection_network(size, tuple(range(size)))
    for values in itertools.product((0, 1), repeat=size):
        assert run(network, list(values)) == sorted(values)


@pytest.mark.parametrize("size", [4, 6, 8, 12, 16, 32])
def test_pruned_networks_find_their_order_statistics(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    for wanted in ((0, 1), (size // 2 - 1, size // 2), (size - 2, size - 1)):
        network = selection_network(size, wanted)
        for _ in range(200):
            values = torch.randint(0, size, (size,), generator=generator).tolist()
            result = run(network, values)
            assert [result[i] for i in wanted] == [sorted(values)[i] for i in wanted]


def test_pruning_leaves_what_the_docstring_says() -> None:
    assert len(selection_network(8, tuple(range(8)))) == 19
    assert len(selection_network(8, (1, 2))) < 19


def test_the_cut_is_the_least_weight_that_is_kept() -> None:
    generator = torch.Generator().manual_seed(0)
    gammas = torch.cat(
        [torch.rand(2000, generator=generator) * 10.0 ** torch.randint(-5, 5, (2000,)), torch.tensor([1e-5, 1e30])]
    )
    reciprocal = torch.ones(()) / gammas
    least = weights._least_kept(reciprocal)
    assert (((least * reciprocal).round() >= 1) | least.isinf()).all()
    assert ((torch.nextafter(least, torch.zeros(())) * reciprocal).round() < 1).all()


@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("nm", [(6, 8), (2, 4), (5, 6), (1, 3), (20, 32), (31, 32), (1, 32)], ids=str)
def test_blocks_ties_and_precision_modes_do_not_show(
    monkeypatch: pytest.MonkeyPatch, nm: tuple[int, int], precision: str
) -> None:
    monkeypatch.setattr(weights, "_BLOCK_ELEMENTS", 1000)
    generator = torch.Generator().manual_seed(nm[1])
    w = torch.randn(37, 480, generator=generator) * 0.02
    w[:10] = w[:10].bfloat16().float()  # many ties
    w[10] = 0.25
    gamma = torch.rand(37, generator=generator) * 0.04 + 1e-5
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        codes, mask = kernels.codes_from_gamma(w, gamma, *nm, backend="cpu")
        alone = kernels.nm_mask(w, *nm, backend="cpu")
    finally:
        torch.set_float32_matmul_precision(before)
    expected = reference.codes_from_gamma(w, gamma, *nm)
    assert_same_bits((codes, mask), expected)
    assert_same_bits(alone, expected[1])
