"""Ternary linear layers for 1 to 32 tokens: weights stay packed in memory and are decoded in registers.

    Y [tokens, out] = ((X_q @ C^T) * s_x[token]) * gamma[row] + bias

With few tokens a layer costs what reading its weights costs, so weights are stored below one byte and every operation
of the decoding counts. Four codes are therefore decoded at once (`decode_words`), as the four bytes of an int32 that
hold 64 * code (a field in the top bits of a byte needs no sign extension), and multiplied with four bytes of X_q by
one `dp4a`. The factor is taken out of the sum, exactly: |64 * acc| <= 64 * 128 * in <= 2^30.

    format    bytes a weight  a unit of a row is
    two_bit   0.25            int32, 16 codes (`packing.pack`)
    trits     0.2             int32, 20 codes (`trits.pack_trits`)
    six_bit   0.1875          int32 + int16, 32 codes, 2:4 (`trits.pack_six_bit`)
    triples   0.16667         int16, 12 codes, 2:4 (`trits.pack_triples`)

Rows are padded to whole groups of four units, so that they are read in wide loads. X_q is put in the order in which
codes come out, once per call: tokens * in bytes, against out * in / 4 of weights. From 16 tokens on, the GEMM is a
`tl.dot` (tensor cores) with the weights on the wide side.

A split over in gives small layers enough programs; a second pass adds the parts in a fixed order, all in integers.
"""

# Triton reads the annotations of kernels itself, so these have none.
# ruff: noqa: ANN001, ANN202, ANN201
# mypy: disable-error-code="no-untyped-def, assignment"

from dataclasses import dataclass
from types import MappingProxyType

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from sbn_kernels.formats import packing, trits
from sbn_kernels.gpu.decode.decode_words import dot4, first_registers, load_units, next_word, place_of
from sbn_kernels.gpu.primitives.tiles import INTERPRETED, round_to
from sbn_kernels.inspection import INT8_MMA, Build
from sbn_kernels.reference import MAX_REDUCTION

MAX_TOKENS = 32

BYTES_PER_WEIGHT = MappingProxyType({"two_bit": 1 / 4, "trits": 1 / 5, "six_bit": 3 / 16, "triples": 1 / 6})
"""Format -> bytes a weight, for widths without padding."""

_DOT_TOKENS = 16
# Rows and warps of a program. Masks and signs of 128 rows take more registers than there are: some spilled on sm_120.
_DOT_SHAPE = MappingProxyType({"two_bit": (128, 8), "trits": (128, 8), "six_bit": (64, 4), "triples": (128, 8)})
_DOT_STAGES = 2
_PROGRAMS = 264
_UNIT_GROUP = 4
_KINDS = MappingProxyType({"two_bit": 0, "trits": 1, "six_bit": 2, "triples": 3})
_PLANES = MappingProxyType({"two_bit": 4, "trits": 5, "six_bit": 8, "triples": 3})


@dataclass(frozen=True)
class PackedWeight:
    """A packed ternary matrix, as `pack_weight` makes it.

    Attributes:
        data: uint8 [out, bytes a row].
        format: one of `BYTES_PER_WEIGHT`.
        out_features, in_features: of the matrix.
    """

    data: Tensor
    format: str
    out_features: int
    in_features: int

    @property
    def units(self) -> int:
        """Units of a row (see the module's docstring), a multiple of 4."""
        columns = 4 * _PLANES[self.format]
        return -(-self.in_features // (columns * _UNIT_GROUP)) * _UNIT_GROUP

    @property
    def bytes_per_weight(self) -> float:
        """Bytes a weight with the padding of this width."""
        return self.data.nbytes / (self.out_features * self.in_features)


def pack_weight(codes: Tensor, format: str) -> PackedWeight:
    """Pack ternary codes int8 [out, in] for `decode_linear`.

    Raises:
        ValueError: an unknown format, codes that are not int8 [out, in] in {-1, 0, 1}, in > 131072, or, for the
            formats six_bit and triples, more than 2 non-zeros in a group of 4.
    """
    if format not in BYTES_PER_WEIGHT:
        raise ValueError(f"format {format!r} is not one of: {', '.join(BYTES_PER_WEIGHT)}")
    if codes.dim() != 2 or not 1 <= codes.shape[1] <= MAX_REDUCTION:
        raise ValueError(f"codes must be [out, in] with 1 <= in <= {MAX_REDUCTION}, got shape {tuple(codes.shape)}")
    columns = 4 * _PLANES[format] * _UNIT_GROUP
    padded = pad(codes, (0, -codes.shape[1] % columns))
    pack = {
        "two_bit": packing.pack,
        "trits": trits.pack_trits,
        "six_bit": trits.pack_six_bit,
        "triples": trits.pack_triples,
    }[format]
    return PackedWeight(pack(padded).contiguous(), format, codes.shape[0], codes.shape[1])


def _planes(x_q: Tensor, weight: PackedWeight, tokens: int) -> Tensor:
    """Return X_q in the order of decoding, int8 [tokens, planes, 4, units]: byte b of what plane f of a unit yields.

    `tokens` pads with zeros. Formats of whole bytes yield one code of each of the unit's four bytes; formats of groups
    yield a group of four consecutive codes.
    """
    planes, units = _PLANES[weight.format], weight.units
    x = pad(x_q, (0, 4 * planes * units - x_q.shape[1], 0, tokens - x_q.shape[0]))
    if weight.format in ("two_bit", "trits"):
        return x.view(tokens, units, 4, planes).permute(0, 3, 2, 1)
    return x.view(tokens, units, planes, 4).permute(0, 2, 3, 1)


@triton.jit
def _finish_tile(acc, rows, token, s_x, gamma, bias, Y, out_features, KIND: tl.constexpr):
    """Scale and store 64 * acc, int32 [rows], of one token."""
    inside = rows < out_features
    total = (0 - acc if KIND == 1 else acc) >> 6
    y = total.to(tl.float32) * tl.load(s_x + token)
    y = y * tl.load(gamma + rows, mask=inside, other=0.0)
    if bias is not None:
        y = y + tl.load(bias + rows, mask=inside, other=0.0).to(tl.float32)
    tl.store(Y + token * out_features + rows, round_to(y, Y.dtype.element_ty), mask=inside)


@triton.jit
def decode_kernel(
    W,
    S,
    X,
    s_x,
    gamma,
    bias,
    Y,
    parts,
    tokens,
    out_features,
    UNITS: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
    KIND: tl.constexpr,
    PLANES: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Rows of Y for up to 8 tokens, by dp4a.

    W int32 or int16 [out, UNITS] (six_bit: rows of 1.5 UNITS int32, the masks, and S the same memory as int16, of which
    the last UNITS of a row are the signs); X int32 [TOKENS, PLANES, UNITS]; parts int32 [SPLITS, TOKENS, out].
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    inside = rows < out_features
    row = rows.to(tl.int64)[:, None]
    acc = (tl.zeros((ROWS, BLOCK), tl.int32),)
    for _ in tl.static_range(TOKENS - 1):
        acc = acc + (tl.zeros((ROWS, BLOCK), tl.int32),)  # noqa: RUF005
    for start in range(0, CHUNK, BLOCK):
        units = part * CHUNK + start + tl.arange(0, BLOCK)
        valid = (units < UNITS) & (start + tl.arange(0, BLOCK) < CHUNK)
        here = inside[:, None] & valid[None, :]
        a, b, signs = first_registers(*load_units(W, S, row, units[None, :], here, UNITS, KIND), KIND)
        for f in tl.static_range(PLANES):
            word, a, b = next_word(a, b, signs, f, KIND)
            grown = ()
            for t in tl.static_range(TOKENS):
                x = tl.load(X + (t * PLANES + place_of(f, PLANES, KIND)) * UNITS + units, mask=valid, other=0)
                grown = grown + (dot4(word, x[None, :], acc[t], NATIVE),)  # noqa: RUF005
            acc = grown
    for t in tl.static_range(TOKENS):
        total = tl.sum(acc[t], axis=1)
        if SPLITS == 1:
            if t < tokens:
                _finish_tile(total, rows, t, s_x, gamma, bias, Y, out_features, KIND)
        else:
            tl.store(parts + (part * TOKENS + t) * out_features + rows, total, mask=inside)


@triton.jit
def decode_dot_kernel(
    W,
    S,
    X,
    parts,
    out_features,
    UNITS: tl.constexpr,
    CHUNK: tl.constexpr,
    KIND: tl.constexpr,
    PLANES: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """parts int32 [splits, TOKENS, out] for 16 or 32 tokens, by tensor cores; X int8 [TOKENS, PLANES, 4, UNITS]."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    token = tl.arange(0, TOKENS)
    inside = rows < out_features
    row = rows.to(tl.int64)[:, None]
    acc = tl.zeros((ROWS, TOKENS), tl.int32)
    for start in range(0, CHUNK, BLOCK):
        units = part * CHUNK + start + tl.arange(0, BLOCK)
        valid = (units < UNITS) & (start + tl.arange(0, BLOCK) < CHUNK)
        here = inside[:, None] & valid[None, :]
        a, b, signs = first_registers(*load_units(W, S, row, units[None, :], here, UNITS, KIND), KIND)
        for f in tl.static_range(PLANES):
            word, a, b = next_word(a, b, signs, f, KIND)
            for i in tl.static_range(4):
                offset = ((token * PLANES + place_of(f, PLANES, KIND)) * 4 + i)[None, :] * UNITS + units[:, None]
                x = tl.load(X + offset, mask=valid[:, None], other=0)  # [BLOCK, TOKENS]
                acc = tl.dot((word >> (8 * i)).to(tl.int8), x, acc, out_dtype=tl.int32)
    place = (part * TOKENS + token)[None, :] * out_features + rows[:, None]
    tl.store(parts + place, acc, mask=inside[:, None])


@triton.jit
def decode_finish_kernel(
    parts,
    s_x,
    gamma,
    bias,
    Y,
    out_features,
    SPLITS: tl.constexpr,
    TOKENS: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add parts int32 [SPLITS, TOKENS, out] in order, scale and store: one program a token and block of rows."""
    token = tl.program_id(0)
    rows = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.int32)
    for part in tl.static_range(SPLITS):
        place = (part * TOKENS + token) * out_features + rows
        acc += tl.load(parts + place, mask=rows < out_features, other=0)
    _finish_tile(acc, rows, token, s_x, gamma, bias, Y, out_features, KIND)


def _splits(out_features: int, rows: int, units: int, block: int) -> int:
    """Return how many programs share a row: a power of two that gives about two programs a multiprocessor."""
    splits = 1
    while splits < 16 and triton.cdiv(out_features, rows) * splits < _PROGRAMS and units > 2 * splits * block:
        splits *= 2
    return splits


def _check(x_q: Tensor, s_x: Tensor, weight: PackedWeight, gamma_per_row: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError unless shapes and dtypes are those that `decode_linear` documents."""
    tokens, out_features = x_q.shape[0], weight.out_features
    if x_q.dtype != torch.int8 or x_q.dim() != 2 or x_q.shape[1] != weight.in_features:
        raise ValueError(f"x_q must be int8 [tokens, {weight.in_features}], got {x_q.dtype} {tuple(x_q.shape)}")
    if not 0 <= tokens <= MAX_TOKENS:
        raise ValueError(f"{tokens} tokens: decoding takes at most {MAX_TOKENS}, use the int8 GEMM for more")
    if s_x.dtype != torch.float32 or s_x.shape != (tokens,):
        raise ValueError(f"s_x must be fp32 [{tokens}], got {s_x.dtype} {tuple(s_x.shape)}")
    if gamma_per_row.dtype != torch.float32 or gamma_per_row.shape != (out_features,):
        raise ValueError(f"gamma_per_row must be fp32 [{out_features}], got {tuple(gamma_per_row.shape)}")
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"bias must be [{out_features}], got {tuple(bias.shape)}")


def decode_linear(
    x_q: Tensor,
    s_x: Tensor,
    weight: PackedWeight,
    gamma_per_row: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    *,
    splits: int | None = None,
) -> Tensor:
    """Return Y [tokens, out] for at most 32 tokens, the same bits as `reference.ternary_linear`.

    Args:
        x_q: int8 [tokens, in].
        s_x: fp32 [tokens].
        weight: of `pack_weight`, on the device of x_q.
        gamma_per_row: fp32 [out].
        bias: [out] of any float dtype, or None.
        out_dtype: fp32, bf16 or fp16.
        splits: parts of a row that are summed by different programs; chosen by shape if None.

    Raises:
        ValueError: shapes or dtypes that are not these, or more than 32 tokens.
    """
    _check(x_q, s_x, weight, gamma_per_row, bias)
    y = torch.empty(x_q.shape[0], weight.out_features, dtype=out_dtype, device=x_q.device)
    if y.numel():
        _launch(x_q, weight, (s_x, gamma_per_row, bias), y, splits)
    return y


def _launch(
    x_q: Tensor, weight: PackedWeight, scales: tuple[Tensor, Tensor, Tensor | None], y: Tensor, splits: int | None
) -> None:
    """Fill Y: the GEMM, and the second pass where there are parts to add."""
    (tokens, out_features), units = y.shape, weight.units
    block_tokens = triton.next_power_of_2(tokens)
    dot = block_tokens >= _DOT_TOKENS
    rows, warps = _DOT_SHAPE[weight.format] if dot else (8, 4)
    block = 32 if dot else 128 if block_tokens <= 4 else 64
    block = 256 if INTERPRETED.value else block
    splits = splits or _splits(out_features, rows, units, block)
    chunk = triton.cdiv(units, splits * _UNIT_GROUP) * _UNIT_GROUP
    kind = _KINDS[weight.format]
    words = weight.data.view(torch.int16 if weight.format == "triples" else torch.int32)
    signs = weight.data.view(torch.int16)
    x = _planes(x_q, weight, block_tokens)
    parts = torch.empty(splits, block_tokens, out_features, dtype=torch.int32, device=x_q.device)
    shared = {"UNITS": units, "CHUNK": chunk, "KIND": kind, "PLANES": _PLANES[weight.format], "TOKENS": block_tokens}
    shared |= {"ROWS": rows, "BLOCK": block}
    grid = (triton.cdiv(out_features, rows), splits)
    if dot:
        decode_dot_kernel[grid](
            *(words, signs, x.contiguous(), parts, out_features),
            **shared,
            num_warps=warps,
            num_stages=_DOT_STAGES,
        )
    else:
        x = x.transpose(2, 3).contiguous().view(torch.int32)  # [tokens, planes, units, 1]
        decode_kernel[grid](
            *(words, signs, x, *scales, y, parts, tokens, out_features),
            SPLITS=splits,
            NATIVE=not INTERPRETED.value,
            **shared,
            num_warps=warps,
            enable_fp_fusion=False,
        )
    if dot or splits > 1:
        decode_finish_kernel[(tokens, triton.cdiv(out_features, 256))](
            *(parts, *scales, y, out_features),
            SPLITS=splits,
            TOKENS=block_tokens,
            KIND=kind,
            BLOCK=256,
            enable_fp_fusion=False,
        )


def _builds() -> tuple[Build, ...]:
    """Every format with 1, 8 and 32 tokens at 2048 columns, and the second pass."""
    pointers = {"W": "*i32", "S": "*i16", "s_x": "*fp32", "gamma": "*fp32", "bias": "*bf16", "Y": "*bf16"}
    pointers |= {"parts": "*i32", "tokens": "i32", "out_features": "i32"}
    builds = []
    for name, kind in _KINDS.items():
        planes = _PLANES[name]
        units = triton.cdiv(2048, 4 * planes * _UNIT_GROUP) * _UNIT_GROUP
        kinds = pointers | {"W": "*i16" if name == "triples" else "*i32"}
        shape = {"UNITS": units, "CHUNK": units, "KIND": kind, "PLANES": planes}
        for tokens, block in ((1, 128), (8, 64)):
            constants = shape | {"SPLITS": 1, "TOKENS": tokens, "ROWS": 8, "BLOCK": block}
            constants |= {"NATIVE": True}
            signature = kinds | {"X": "*i32"}
            builds.append(Build(f"decode[{name} {tokens}]", decode_kernel, signature, constants, fusion=False))
        rows, warps = _DOT_SHAPE[name]
        constants = shape | {"TOKENS": 32, "ROWS": rows, "BLOCK": 32}
        builds.append(
            Build(
                *(f"decode[{name} 32]", decode_dot_kernel, kinds | {"X": "*i8"}, constants, warps, _DOT_STAGES),
                instruction=INT8_MMA,
            )
        )
    constants = {"SPLITS": 4, "TOKENS": 8, "KIND": 1, "BLOCK": 256}
    builds.append(Build("decode[finish]", decode_finish_kernel, pointers, constants, fusion=False))
    return tuple(builds)


BUILDS = _builds()
"""What `sbn_kernels.inspection` compiles."""
