"""What is measured: the linear layers of Qwen2.5 (arXiv 2412.15115, table 1), and what a run was asked to take of them.

A linear layer of a model maps [tokens, in] to [tokens, out]:

    qkv      hidden -> (heads + 2 kv_heads) * head_size       three parts, a scale each
    o        heads * head_size -> hidden
    gate_up  hidden -> 2 ffn                                  two parts
    down     ffn -> hidden
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

MOST_TOKENS = 65536
"""Largest token count that is measured; the smallest is 1, for decoding."""


@dataclass(frozen=True)
class Linear:
    """One linear layer: `name` is "3b.down"; `parts` are the row counts with a scale each, which add up to out."""

    name: str
    in_features: int
    parts: tuple[int, ...]

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return sum(self.parts)

    @property
    def weights(self) -> int:
        """Elements of the weight."""
        return self.out_features * self.in_features


@dataclass(frozen=True)
class Model:
    """Widths of a transformer, in features."""

    name: str
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_size: int

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The four linear layers of a transformer layer."""
        query, key = self.heads * self.head_size, self.kv_heads * self.head_size
        return (
            Linear(f"{self.name}.qkv", self.hidden, (query, key, key)),
            Linear(f"{self.name}.o", query, (self.hidden,)),
            Linear(f"{self.name}.gate_up", self.hidden, (self.ffn, self.ffn)),
            Linear(f"{self.name}.down", self.ffn, (self.hidden,)),
        )


MODELS: Mapping[str, Model] = MappingProxyType(
    {
        "0.5b": Model("0.5b", 896, 4864, 14, 2, 64),
        "1.5b": Model("1.5b", 1536, 8960, 12, 2, 128),
        "3b": Model("3b", 2048, 11008, 16, 2, 128),
        "7b": Model("7b", 3584, 18944, 28, 4, 128),
    }
)
"""By the name that `--models` takes."""

VOCABULARY = 151936
"""Rows of Qwen2.5's output embedding."""


@dataclass(frozen=True)
class Selection:
    """What a run was asked for; None stands for a kernel's own choice.

    Attributes:
        device: where it runs.
        models: their linear layers are measured.
        tokens: rows of X.
        vocabulary: rows of the output embedding.
    """

    device: torch.device
    models: tuple[Model, ...] | None = None
    tokens: tuple[int, ...] | None = None
    vocabulary: int = VOCABULARY

    def models_or(self, *names: str) -> tuple[Model, ...]:
        """The models that were asked for, or these."""
        return self.models if self.models is not None else tuple(MODELS[name] for name in names)

    def tokens_or(self, *tokens: int) -> tuple[int, ...]:
        """The token counts that were asked for, or these."""
        return self.tokens if self.tokens is not None else tokens
