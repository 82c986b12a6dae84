"""What every launch checks and chooses: the device, and the shape of a block that holds a whole row."""

import torch
import triton
from torch import Tensor

LONGEST_ROW = 32768
"""Elements of a row that one block of threads keeps in registers."""


def check_device(*tensors: Tensor | None) -> None:
    """Raise ValueError unless all tensors are on one CUDA device, or on CPU with kernels interpreted."""
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        raise ValueError(f"tensors of one call are on {', '.join(sorted(map(str, devices)))}; move them to one device")
    device = next(iter(devices), torch.device("cpu"))
    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise ValueError(f"backend 'triton' needs CUDA tensors, got {device}; use backend 'auto' or 'cpu'")


def row_block(width: int) -> tuple[int, int]:
    """Return (block, warps) for kernels that hold a row of `width` elements: 8 to 32 of them in each thread.

    Raises:
        ValueError: the row is longer than `LONGEST_ROW`.
    """
    if width > LONGEST_ROW:
        raise ValueError(f"rows of {width} elements are longer than the {LONGEST_ROW} that a block holds")
    block = max(triton.next_power_of_2(width), 16)
    return block, min(max(block // 256, 1), 16 if block <= LONGEST_ROW // 2 else 32)
