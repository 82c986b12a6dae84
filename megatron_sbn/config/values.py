"""The types of a recipe's values, and how people may write them: 6:8, none, one path for a list of shards."""

import os
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

LARGEST = 2**53  # every whole number up to it is one in JSON, in a float and in 64 bits
Positive = Annotated[int, Field(ge=1, le=LARGEST)]
NonNegative = Annotated[int, Field(ge=0, le=LARGEST)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _parse_sparsity(value: Any) -> Any:  # noqa: ANN401 - anything that YAML can hold
    """'6:8' or [6, 8] -> (6, 8)."""
    if isinstance(value, str) and re.fullmatch(r"\d+:\d+", value):
        return tuple(int(part) for part in value.split(":"))
    if isinstance(value, (list, tuple)) and len(value) == 2 and all(type(part) is int for part in value):
        return tuple(value)
    raise ValueError("write N:M, such as 6:8")


def _parse_bits(value: Any) -> Any:  # noqa: ANN401 - anything that YAML can hold
    return None if value == "none" else value


def as_tuple(value: Any) -> Any:  # noqa: ANN401 - anything that YAML can hold
    """A list as a tuple."""
    return tuple(value) if isinstance(value, list) else value


def parse_shards(value: Any) -> Any:  # noqa: ANN401 - anything that YAML can hold
    """One path, or a list of paths and of mappings with a weight."""
    items = [value] if isinstance(value, (str, dict)) else value
    if isinstance(items, (list, tuple)):
        return tuple({"path": item} if isinstance(item, str) else item for item in items)
    return value


def _none_if_one(value: int | None) -> int | None:
    return None if value == 1 else value


def _check_folder(value: str) -> str:
    if not value:
        raise ValueError("is empty; name a folder, or null for the default")
    if "\0" in value or any(len(os.fsencode(part)) > 255 for part in value.split("/")):
        raise ValueError("no folder can be called so; a name in it has at most 255 bytes, and no NUL")
    return value


Sparsity = Annotated[tuple[int, int], BeforeValidator(_parse_sparsity)]
ActivationBits = Annotated[Literal[8, 4] | None, BeforeValidator(_parse_bits)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)]  # of files, too
Folder = Annotated[str, AfterValidator(_check_folder)]
# One chunk a rank is no interleaving, for which Megatron-Core has a schedule, names and checks of its own.
ChunksPerRank = Annotated[Positive | None, AfterValidator(_none_if_one)]
WeightFormat = Literal["ternary", "dense"]


def short_dtype(value: object) -> object:
    """PyTorch's name of a type as Megatron's: float32 -> fp32."""
    return {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}.get(str(value), value)


class Section(BaseModel):
    """Base of every section: frozen, no unknown keys, no silent conversions."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", validate_default=True, use_attribute_docstrings=True
    )
