"""Random operands of a ternary layer, for the tests of every GEMM and format."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TWO_FOUR_GROUPS = [g for g in itertools.product((-1, 0, 1), repeat=4) if sum(c != 0 for c in g) <= 2]


def ternary_codes(out: int, features: int, seed: int = 0, device: str = DEVICE) -> Tensor:
    """Int8 [out, features] in {-1, 0, 1}."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, (out, features), dtype=torch.int8, generator=generator).to(device)


def two_four_codes(
    out: int,
    features: int,
    seed: int = 0,
    device: str = DEVICE,
    groups: Sequence[tuple[int, ...]] = TWO_FOUR_GROUPS,
) -> Tensor:
    """Int8 [out, features] of random `groups`: 0, 1 or 2 non-zeros in each 4."""
    choice = torch.randint(len(groups), (out, -(-features // 4)), generator=torch.Generator().manual_seed(seed))
    return torch.tensor(groups, dtype=torch.int8)[choice].flatten(1)[:, :features].contiguous().to(device)


def operands(
    tokens: int, out: int, features: int, *, seed: int = 0, two_four: bool = False, device: str = DEVICE
) -> tuple[Tensor, ...]:
    """x_q over all of int8, s_x, codes, gamma, bias."""
    g = torch.Generator().manual_seed(seed + tokens + out + features)
    x_q = torch.randint(-128, 128, (tokens, features), dtype=torch.int8, generator=g)
    s_x, gamma, bias = (torch.rand(n, generator=g) + 0.01 for n in (tokens, out, out))
    codes = (two_four_codes if two_four else ternary_codes)(out, features, seed + out, device)
    return x_q.to(device), s_x.to(device), codes, gamma.to(device), (bias - 0.5).to(device)
