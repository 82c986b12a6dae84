"""sparse_bitlinear: recorded outputs of the published code, fp64 straight-through gradients, every setting."""

import ast
import gc
import math
import weakref
from pathlib import Path

import numpy as np
import pytest
import sbn_kernels as kernels
import torch
from same_bits import assert_same_bits, relative
from torch import Tensor

from megatron_sbn.functional import LinearSettings, apply_linear, prepare_weight, sparse_bitlinear
from megatron_sbn.functional.collectives import LocalCollectives

VECTORS = np.load(Path(__file__).parents[1] / "vectors" / "reference_linear.npz")
CASES = [ast.literal_eval(str(case)) for case in VECTORS["meta"]]


def run(x: Tensor, w: Tensor, gy: Tensor, bias: Tensor | None = None, **settings: object) -> tuple[Tensor, ...]:
    """Return (y, dx, dw[, dbias]) of one call."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, w, *([bias] if bias is not None else []))]
    y = sparse_bitlinear(leaves[0], leaves[1], bias=leaves[2] if bias is not None else None, **settings)
    y.backward(gy.to(y.dtype))
    return (y.detach(), *(leaf.grad for leaf in leaves))


def inputs(out: int = 24, width: int = 64, tokens: tuple[int, ...] = (7, 3), seed: int = 0) -> tuple[Tensor, ...]:
    rng = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=rng)  # noqa: E731
    return draw(*tokens, width), draw(out, width) * 0.02, draw(*tokens, out), draw(out)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_recorded_outputs_of_the_published_code(case: tuple) -> None:
    index, dtype, kind, n, m, splits = case
    w, x, gy, *expected = (torch.from_numpy(VECTORS[f"{index}.{name}"]) for name in ("w", "x", "gy", "y", "gx", "gw"))
    compute = {"torch.float32": torch.float32, "torch.bfloat16": torch.bfloat16}[dtype]
    weight_format = {"bitnet": "ternary", "bf16sparse": "dense"}[kind]
    results = run(x.to(compute), w, gy, sparsity=(n, m), splits=splits, weight_format=weight_format)
    # The published code multiplies fake-quantized bf16 operands; exact integers differ by those roundings (2^-8 each).
    tolerance = 1e-5 if compute == torch.float32 else 2**-7
    for name, ours, theirs in zip(("y", "gx", "gw"), results, expected, strict=True):
        assert relative(ours, theirs) < tolerance, name
    assert results[0].dtype == results[1].dtype == compute
    assert results[2].dtype == torch.float32


def straight_through(x: Tensor, w: Tensor, bias: Tensor | None, splits: list[int], **s: object) -> Tensor:
    """The method in fp64 with plain autograd: each rounding is `t + (rounded - t).detach()`."""
    n, m = s["sparsity"]
    order = torch.argsort(-w.detach().abs().unflatten(1, (-1, m)), dim=-1, stable=True)
    keep = torch.zeros(order.shape, dtype=torch.float64).scatter_(-1, order[..., :n], 1.0).flatten(1)
    if s["weight_format"] == "ternary":
        after = keep if s["order"] == "mask_then_quant" else torch.ones_like(keep)
        parts = zip((w.detach().abs() * after).split(splits), after.split(splits), strict=True)
        gamma = torch.cat([(p.sum() / a.sum()).clamp(min=1e-5).expand(p.shape[0]) for p, a in parts]).unsqueeze(1)
        codes = (w.detach() / gamma).round().clamp(-1, 1)
        if s["mask_source"] == "quantized":
            order = torch.argsort(-codes.abs().unflatten(1, (-1, m)), dim=-1, stable=True)
            keep = torch.zeros(order.shape, dtype=torch.float64).scatter_(-1, order[..., :n], 1.0).flatten(1)
        effective = gamma * codes * keep
    else:
        effective = w.detach() * keep
    latent = w * keep if s["masked_gradient"] == "masked" else w
    weight = latent + (effective - latent).detach()
    if s["sr_ste_decay"]:
        # Value 0, gradient decay * (1 - mask) * W, once per call.
        decay = 0.5 * s["sr_ste_decay"] * ((1 - keep) * w.square()).sum()
        extra = decay - decay.detach()
    bits = s["activation_bits"] if s["weight_format"] == "ternary" else None
    if bits == 8:
        a = x.detach().abs().amax(-1, keepdim=True).clamp(min=1e-5)
        x = x + ((x.detach() * 127 / a).round() * a / 127 - x).detach()
    elif bits == 4:
        r = math.sqrt(7) / x.detach().abs().mean(-1, keepdim=True).clamp(min=1e-5)
        x = x + ((x.detach() * r).round().clamp(-8, 7) / r - x).detach()
    y = x @ weight.t()
    y = y if bias is None else y + bias
    return (y, extra) if s["sr_ste_decay"] else (y, None)


DEFAULTS = {
    "sparsity": (6, 8),
    "weight_format": "ternary",
    "activation_bits": 8,
    "order": "quant_then_mask",
    "mask_source": "latent",
    "masked_gradient": "dense",
    "sr_ste_decay": 0.0,
}
VARIANTS = [
    {},
    {"sparsity": (2, 4)},
    {"sparsity": (8, 8)},
    {"sparsity": (3, 16)},
    {"sparsity": (7, 32)},
    {"sparsity": (1, 1)},
    {"order": "mask_then_quant"},
    {"order": "mask_then_quant", "sparsity": (2, 4), "masked_gradient": "masked"},
    {"mask_source": "quantized"},
    {"mask_source": "quantized", "sparsity": (2, 4), "masked_gradient": "masked"},
    {"masked_gradient": "masked"},
    {"sr_ste_decay": 0.3},
    {"sr_ste_decay": 0.3, "masked_gradient": "masked", "sparsity": (2, 4)},
    {"activation_bits": 4},
    {"activation_bits": None},
    {"activation_bits": None, "masked_gradient": "masked", "sr_ste_decay": 0.1},
    {"activation_bits": None, "order": "mask_then_quant"},
    {"weight_format": "dense"},
    {"weight_format": "dense", "sparsity": (8, 8)},
    {"weight_format": "dense", "masked_gradient": "masked", "sr_ste_decay": 0.2},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("splits", [[24], [16, 4, 4]], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_every_setting_has_the_gradients_of_fp64_straight_through(
    variant: dict[str, object], splits: list[int], with_bias: bool
) -> None:
    s = {**DEFAULTS, **variant}
    x, w, gy, b = inputs()
    w[16:] *= 3
    bias = b if with_bias else None
    leaves = [t.double().requires_grad_() for t in (x, w, *([b] if with_bias else []))]
    y, extra = straight_through(leaves[0], leaves[1], leaves[2] if with_bias else None, splits, **s)
    total = (y * gy.double()).sum()
    (total if extra is None else total + extra).backward()
    results = run(x, w, gy, bias, splits=splits, **s)
    for name, ours, exact in zip(
        ("y", "dx", "dw", "db"), results, (y.detach(), *(t.grad for t in leaves)), strict=with_bias
    ):
        assert ours.shape == exact.shape
        assert relative(ours, exact) < 1e-5, name


@pytest.mark.parametrize(
    "variant", [{}, {"sparsity": (2, 4)}, {"activation_bits": 4}, {"order": "mask_then_quant"}], ids=str
)
def test_bf16_forward_is_the_fp32_forward_rounded_once(variant: dict[str, object]) -> None:
    x, w, gy, bias = inputs(seed=1)
    x = x.bfloat16()
    low, full = (run(t, w, gy, bias, **variant) for t in (x, x.float()))
    assert_same_bits(low[0], full[0].bfloat16())
    assert (low[0].dtype, low[1].dtype, low[2].dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


def test_bf16_backward_rounds_where_it_says() -> None:
    x, w, gy, bias = inputs(seed=2)
    x, gy = x.bfloat16(), gy.bfloat16()
    _, dx, dw, db = run(x, w, gy, bias, splits=[16, 4, 4], backend="reference")
    codes, gamma = kernels.ternary_codes(w, 6, 8, [16, 4, 4])
    x_q, s_x = kernels.quantize_activations(x)
    g = (gy.float() * kernels.gamma_rows(gamma, [16, 4, 4])).bfloat16().double()
    h = (gy.float() * s_x.unsqueeze(-1)).bfloat16().double().flatten(0, 1)
    assert relative(dx, g @ codes.double()) < 2**-8
    assert relative(dw, h.t() @ x_q.double().flatten(0, 1)) < 1e-6
    assert relative(db, gy.double().sum((0, 1))) < 1e-6
    _, dx, dw, _ = run(x, w, gy, bias, splits=[16, 4, 4])
    rows = kernels.gamma_rows(gamma, [16, 4, 4])
    assert relative(dx, gy.double() @ (rows.double().unsqueeze(1) * codes)) < 2**-8
    assert relative(dw, gy.double().flatten(0, 1).t() @ (s_x.double().unsqueeze(-1) * x_q).flatten(0, 1)) < 2**-8


def test_the_weight_gradient_has_the_weights_dtype() -> None:
    x, w, gy, _ = inputs()
    assert run(x.bfloat16(), w.bfloat16(), gy)[2].dtype == torch.bfloat16


@pytest.mark.parametrize("mode", ["int8_dgrad", "int8"])
@pytest.mark.parametrize("scale", [1.0, 1e-8])
def test_int8_backward_is_the_documented_formula_within_the_documented_bound(mode: str, scale: float) -> None:
    splits = [16, 4, 4]
    x, w, gy, _ = inputs(seed=3)
    gy *= scale
    y, dx, dw = run(x, w, gy, splits=splits, backward=mode)
    exact = run(x, w, gy, splits=splits)
    assert_same_bits(y, exact[0])
    codes, gamma = kernels.ternary_codes(w, 6, 8, splits)
    x_q, s_x = (t.flatten(0, 1) for t in kernels.quantize_activations(x))
    g = (gy * kernels.gamma_rows(gamma, splits)).flatten(0, 1).numpy()
    a = np.abs(g).max(axis=1, keepdims=True)
    g_q = np.rint(g * (np.float32(127) / a)).astype(np.int64)
    expected = (g_q @ codes.numpy().astype(np.int64)).astype(np.float32) * (a / np.float32(127))
    np.testing.assert_array_equal(dx.flatten(0, 1).numpy(), expected)
    bound = torch.from_numpy(a) / 254 * codes.abs().float().sum(0)
    assert ((dx - exact[1]).flatten(0, 1).abs() <= bound * 1.0001).all()
    assert not torch.equal(dx, exact[1])
    if mode == "int8_dgrad":
        assert_same_bits(dw, exact[2])
        return
    h = (gy.flatten(0, 1) * s_x.unsqueeze(-1)).t().numpy()
    a = np.abs(h).max(axis=1, keepdims=True)
    h_q = np.rint(h * (np.float32(127) / a)).astype(np.int64)
    expected = (h_q @ x_q.numpy().astype(np.int64)).astype(np.float32) * (a / np.float32(127))
    np.testing.assert_array_equal(dw.numpy(), expected)
    bound = torch.from_numpy(a) / 254 * x_q.abs().float().sum(0)
    assert ((dw - exact[2]).abs() <= bound * 1.0001).all()


def saved_by(call: object) -> list[Tensor]:
    saved: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        call()
    return saved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backward", ["exact", "int8"])
def test_one_byte_per_input_element_is_saved(dtype: torch.dtype, backward: str) -> None:
    x, w, _, bias = inputs(tokens=(40, 5))
    x, w = x.to(dtype).requires_grad_(), w.requires_grad_()
    settings = LinearSettings(backward=backward)
    prepared = prepare_weight(w, None, settings)
    saved = saved_by(lambda: apply_linear(x, w, bias, prepared, settings, LocalCollectives()))
    derived = {prepared.codes.data_ptr(), prepared.gamma_per_row.data_ptr()}
    activations = [t for t in saved if t.data_ptr() not in derived]
    assert {(t.dtype, t.numel()) for t in activations} == {(torch.int8, x.numel()), (torch.float32, 200)}
    assert sum(t.nbytes for t in activations) == x.numel() + 4 * 200


def test_the_input_is_freed_after_forward() -> None:
    x, w, gy, _ = inputs()
    x, w = x.requires_grad_(), w.requires_grad_()
    doubled = x * 2
    alive = weakref.ref(doubled)
    y = sparse_bitlinear(doubled, w)
    del doubled
    gc.collect()
    assert alive() is None
    y.backward(gy)
    assert_same_bits(x.grad, 2 * run(x * 2, w, gy)[1])


def test_nothing_is_computed_for_what_needs_no_gradient() -> None:
    x, w, gy, _ = inputs()
    x.requires_grad_()
    sparse_bitlinear(x, w).backward(gy)
    assert x.grad is not None
    assert w.grad is None
    w.requires_grad_()
    sparse_bitlinear(x.detach(), w).backward(gy)
    assert_same_bits(w.grad, run(x, w, gy)[2])


@pytest.mark.parametrize(
    "variant", [{}, {"backward": "int8"}, {"activation_bits": None}, {"weight_format": "dense"}], ids=str
)
def test_shapes_strides_and_no_tokens(variant: dict[str, object]) -> None:
    x, w, gy, bias = inputs()
    whole = run(x, w, gy, bias, **variant)
    flat = run(x.flatten(0, 1), w, gy.flatten(0, 1), bias, **variant)
    assert_same_bits([t.flatten() for t in flat], [t.flatten() for t in whole])
    transposed = run(x.transpose(0, 1), w, gy.transpose(0, 1), bias, **variant)
    assert relative(transposed[0].transpose(0, 1), whole[0]) < 1e-6
    assert relative(transposed[2], whole[2]) < (2**-6 if variant.get("backward") else 1e-6)
    empty = run(x[:0], w, gy[:0], bias, **variant)
    assert empty[0].shape == (0, 3, 24)
    assert empty[1].shape == (0, 3, 64)
    assert not empty[2].any()
    assert not empty[3].any()


def test_a_nan_token_shows_in_its_output_only() -> None:
    x, w, _, _ = inputs()
    x[2, 1, 5] = math.nan
    y = sparse_bitlinear(x, w)
    assert y[2, 1].isnan().all()
    assert int(y.isnan().sum()) == 24


@pytest.mark.parametrize(
    "variant", [{}, {"backward": "int8"}, {"activation_bits": None}, {"weight_format": "dense"}], ids=str
)
def test_autocast_changes_nothing(variant: dict[str, object]) -> None:
    x, w, gy, bias = inputs()
    plain = run(x, w, gy, bias, **variant)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run(x, w, gy, bias, **variant)
    assert_same_bits(plain, inside)


def test_a_prepared_weight_serves_every_micro_batch() -> None:
    x, w, gy, _ = inputs()
    settings = LinearSettings()
    prepared = prepare_weight(w, [16, 8], settings)
    y = torch.cat([apply_linear(part, w, None, prepared, settings, LocalCollectives()) for part in x.split(2)])
    assert_same_bits(y, run(x, w, gy, splits=[16, 8])[0])
