"""Ternary 2:4 linear layers on sparse tensor cores: half of the multiplications, 5 bits a weight. Opt-in.

    Y [tokens, out] = ((X_q @ C^T) * s_x[token]) * gamma[row] + bias      C with at most 2 non-zeros in each 4 along in

Triton has no sparse GEMM, so this is written in Gluon, around one instruction in inline assembly, on the layout that
`two_four` packs. A block is [MT * WM tiles of 16 features, NT * WN tiles of 8 tokens, 32 lanes, 4 registers]: a tile is
what one instruction computes, every lane holds its 4 accumulators, and loads weights (16 bytes), their metadata
(4 bytes) and activations (16 bytes, straight from X_q) where its own fragments lie. Nothing passes through shared
memory but the result, which is put into rows of Y there.

Status: the machine code has the sparse instruction and no spills on all architectures, and the addresses, the metadata
and the order of the result are tested against an emulation of the instruction written from the PTX ISA. It has never
run on hardware; speed is unknown. On sm_90 and sm_100 the peak belongs to wgmma and tcgen05, which `cusparselt` uses.
"""

# Triton reads the annotations of kernels itself, so these have none.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def"

from types import MappingProxyType
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from sbn_kernels.formats.two_four import TwoFourWeight
from sbn_kernels.inspection import Build
from sbn_kernels.reference import MAX_REDUCTION

MMA_SP = gl.constexpr(
    "mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32 "
    "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9,$10,$11}, {$12,$13,$14,$15}, $16, 0x0;"
)
"""D = A @ B + C in registers: outputs $0-3; A $4-7, B $8-11, C $12-15, metadata $16 (of four equal copies)."""

SPARSE_MMA = MappingProxyType(dict.fromkeys((80, 90, 100, 120), r"IMMA\.SP"))
"""SASS name of the instruction, by architecture."""

_OUTPUTS = (torch.float32, torch.bfloat16, torch.float16)
_BLOCK = MappingProxyType({"MT": 4, "NT": 8, "WM": 2, "WN": 2})


@gluon.jit
def weight_offset(tile, step, steps, lane, register):
    """Word of `TwoFourWeight.values` with register `register` of a lane's A fragment."""
    return (tile * steps + step) * 128 + lane * 4 + register


@gluon.jit
def metadata_offset(tile, step, steps, lane):
    """Word of `TwoFourWeight.metadata` with a lane's E fragment."""
    return (tile * steps + step) * 32 + lane


@gluon.jit
def token_of(tile, lane):
    """Token of a lane's B fragment, within the block's tiles of 8."""
    return tile * 8 + lane // 4


@gluon.jit
def word_of(step, lane):
    """First of the 4 words of a token's X_q (int32) with a lane's B fragment."""
    return step * 16 + (lane % 4) * 4


@gluon.jit
def rows_of_result(acc, M: gl.constexpr, N: gl.constexpr):
    """Accumulators [M, N, 32, 4] of the block as a matrix [8 N tokens, 16 M features]."""
    # lane = 4 g + t and register = 2 h + p hold feature g + 8 h and token 2 t + p.
    return acc.reshape([M, N, 8, 4, 2, 2]).permute([1, 3, 5, 0, 4, 2]).reshape([8 * N, 16 * M])


@gluon.jit
def scaled(acc, s_x, gamma):
    """(acc * s_x) * gamma, in this order."""
    return (acc * s_x) * gamma


@gluon.jit
def _load(W, E, X, step, steps, im, tokens_at, il, iv, row_words):
    """Fragments A, B and E of a step, each broadcast to the block."""
    a = gl.load(W + weight_offset(im, step, steps, il, iv))
    e = gl.load(E + metadata_offset(im, step, steps, il))
    # Weights beyond `in` are zeros, so any activation may stand there.
    b = gl.load(X + tokens_at + gl.minimum(word_of(step, il), row_words - 4) + iv)
    a, b = gl.broadcast(a, b)
    e, _ = gl.broadcast(e, b)
    return a, b, e


@gluon.jit(do_not_specialize=["tokens"])
def sparse_gemm_kernel(
    W, E, X, s_x, gamma, bias, Y, tokens, out_features, tiles, steps, row_words,
    MT: gl.constexpr, NT: gl.constexpr, WM: gl.constexpr, WN: gl.constexpr,
):  # fmt: skip
    """One block of Y; W and E int32 as packed, X int32 [tokens, row_words], Y [tokens, out]."""
    M: gl.constexpr = MT * WM
    N: gl.constexpr = NT * WN
    L: gl.constexpr = gl.BlockedLayout([MT, NT, 1, 4], [1, 1, 32, 1], [WM, WN, 1, 1], [3, 2, 1, 0])
    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WM * WN, 1], [1, 0])
    first_tile = gl.program_id(0) * M
    first_token = gl.program_id(1) * N * 8
    im = gl.arange(0, M, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, L))))[:, None, None, None]
    jn = gl.arange(0, N, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, L))))[None, :, None, None]
    il = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, L))))[None, None, :, None]
    iv = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, L))))[None, None, None, :]
    # Tiles and tokens outside repeat the last one: loads need no mask, and the result is not stored.
    im = gl.minimum(first_tile + im, tiles - 1)
    token = gl.minimum(first_token + token_of(jn, il), tokens - 1)
    tokens_at = token.to(gl.int64) * row_words
    acc = gl.zeros([M, N, 32, 4], gl.int32, L)
    a, b, e = _load(W, E, X, 0, steps, im, tokens_at, il, iv, row_words)
    for step in range(steps):
        following = gl.minimum(step + 1, steps - 1)
        next_a, next_b, next_e = _load(W, E, X, following, steps, im, tokens_at, il, iv, row_words)
        acc = gl.inline_asm_elementwise(
            MMA_SP, "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r", [a, b, acc, e], gl.int32, is_pure=True, pack=4
        )
        a, b, e = next_a, next_b, next_e
    y = gl.convert_layout(rows_of_result(acc, M, N), OUT).to(gl.float32)
    row = first_token + gl.arange(0, N * 8, gl.SliceLayout(1, OUT))
    column = first_tile * 16 + gl.arange(0, M * 16, gl.SliceLayout(0, OUT))
    s = gl.load(s_x + row, mask=row < tokens, other=0.0)[:, None]
    g = gl.load(gamma + column, mask=column < out_features, other=0.0)[None, :]
    y = scaled(y, s, g)
    if bias is not None:
        y = y + gl.load(bias + column, mask=column < out_features, other=0.0).to(gl.float32)[None, :]
    place = row.to(gl.int64)[:, None] * out_features + column[None, :]
    inside = (row < tokens)[:, None] & (column < out_features)[None, :]
    gl.store(Y + place, y.to(Y.dtype.element_ty), mask=inside)


def sparse_linear(
    x_q: Tensor,
    s_x: Tensor,
    weight: TwoFourWeight,
    gamma_per_row: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return Y [tokens, out] on sparse tensor cores, the same bits as `reference.ternary_linear`. CUDA only.

    Args:
        x_q: int8 [tokens, in], contiguous, in a multiple of 16.
        s_x: fp32 [tokens].
        weight: of `two_four.pack_two_four`.
        gamma_per_row: fp32 [out].
        bias: [out] of any float dtype, or None.
        out_dtype: fp32, bf16 or fp16.

    Raises:
        ValueError: shapes or dtypes that are not these, or tensors that are not on a CUDA device.
    """
    check_sparse(x_q, s_x, weight, gamma_per_row, bias, out_dtype)
    if not x_q.is_cuda:
        raise ValueError(f"sparse_linear runs on CUDA devices only, x_q is on {x_q.device}: use the int8 GEMM")
    tokens, out_features = x_q.shape[0], weight.out_features
    y = torch.empty(tokens, out_features, dtype=out_dtype, device=x_q.device)
    if tokens:
        tiles, steps = weight.values.shape[:2]
        grid = (
            triton.cdiv(tiles, _BLOCK["MT"] * _BLOCK["WM"]),
            triton.cdiv(tokens, 8 * _BLOCK["NT"] * _BLOCK["WN"]),
        )
        sparse_gemm_kernel[grid](
            *(weight.values, weight.metadata, x_q.view(torch.int32), s_x, gamma_per_row, bias, y),
            *(tokens, out_features, tiles, steps, x_q.shape[1] // 4),
            **_BLOCK,
            num_warps=_BLOCK["WM"] * _BLOCK["WN"],
            enable_fp_fusion=False,
        )
    return y


def check_sparse(
    x_q: Tensor, s_x: Tensor, weight: TwoFourWeight, gamma_per_row: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> None:
    """Raise ValueError unless shapes and dtypes are those that `sparse_linear` documents."""
    width, out_features = weight.in_features, weight.out_features
    if x_q.dtype != torch.int8 or x_q.dim() != 2 or x_q.shape[1] != width or not x_q.is_contiguous():
        raise ValueError(f"x_q must be contiguous int8 [tokens, {width}], got {x_q.dtype} {tuple(x_q.shape)}")
    if width % 16 or width > MAX_REDUCTION:
        raise ValueError(f"in_features {width} must be a multiple of 16 up to {MAX_REDUCTION} on sparse tensor cores")
    if s_x.dtype != torch.float32 or s_x.shape != x_q.shape[:1]:
        raise ValueError(f"s_x must be fp32 [{x_q.shape[0]}], got {s_x.dtype} {tuple(s_x.shape)}")
    if gamma_per_row.dtype != torch.float32 or gamma_per_row.shape != (out_features,):
        raise ValueError(f"gamma_per_row must be fp32 [{out_features}], got {tuple(gamma_per_row.shape)}")
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"bias must be [{out_features}], got {tuple(bias.shape)}")
    if out_dtype not in _OUTPUTS:
        raise ValueError(f"out_dtype must be fp32, bf16 or fp16, got {out_dtype}")


def _build(name: str, output: str, biased: bool) -> Build:
    signature = {"W": "*i32", "E": "*i32", "X": "*i32", "s_x": "*fp32", "gamma": "*fp32", "Y": f"*{output}"}
    signature |= dict.fromkeys(("tokens", "out_features", "tiles", "steps", "row_words"), "i32")
    constants: dict[str, Any] = dict(_BLOCK)
    if biased:
        signature["bias"] = "*fp32"
    else:
        constants["bias"] = None
    return Build(
        *(f"sparse_gemm[{name}]", sparse_gemm_kernel, signature, constants, _BLOCK["WM"] * _BLOCK["WN"]),
        fusion=False,
        instruction=SPARSE_MMA,
        aligned=("out_features",),
    )


BUILDS = (_build("bf16", "bf16", False), _build("fp32 bias", "fp32", True))
"""What `sbn_kernels.inspection` compiles."""
