"""Devices: what their data sheets promise, and what the code keeps on them. Sources beside the figures.

Rates are per device and dense unless named otherwise; links are bytes per second that one device sends. Efficiencies
are assumptions, printed with every plan: nothing here was measured on a GPU by this project.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from megatron_sbn.errors import RecipeError

GIB = 2**30


@dataclass(frozen=True)
class Keeps:
    """What layers keep between forward and backward, where backends differ.

    Attributes:
        fused: whether one kernel makes int8 activations of a norm's or SwiGLU's input (8-bit activations), so that the
            floating result in between is never stored.
        norm_copies: fp32 tensors of the input's size that an unfused RMSNorm keeps.
        transposed: whether codes are kept transposed too, as the input gradient reads them.
        packed: whether the forward product may read the codes in a packed form beside the int8 ones.
    """

    fused: bool
    norm_copies: int
    transposed: bool
    packed: bool


# The norm of CUDA saves its fp32 input; PyTorch's on CPU is made of several operations, and saves the quotient too.
ON_CUDA = Keeps(fused=True, norm_copies=1, transposed=True, packed=True)
ON_CPU = Keeps(fused=False, norm_copies=2, transposed=False, packed=False)


@dataclass(frozen=True)
class Device:
    """One accelerator: memory in bytes, operations and bytes per second.

    Attributes:
        reserve: of the memory, for the runtime, communication buffers and fragmentation; assumed.
        node_link: bytes/s that a device sends within a node. network: between nodes, one adapter a device.
    """

    name: str
    memory: float
    reserve: float
    bf16: float
    fp32: float
    int8: float
    sparse_int8: float
    bandwidth: float
    node_link: float
    network: float
    keeps: Keeps
    source: str


@dataclass(frozen=True)
class Efficiency:
    """Shares of a ceiling that are assumed to be reached. Assumptions, not measurements."""

    int8_gemm: float = 0.60
    floating_gemm: float = 0.75
    attention: float = 0.40
    bandwidth: float = 0.80
    link: float = 0.75


def _nvidia(
    name: str, gigabytes: int, rates: tuple[float, float, float], links: tuple[int, int], source: str
) -> Device:
    """rates: bf16 TFLOP/s, int8 TOP/s, memory TB/s. links: GB/s within a node and between nodes, one direction."""
    bf16, int8, bandwidth = rates
    return Device(
        name=name,
        memory=gigabytes * 1e9,
        reserve=4 * GIB,
        bf16=bf16 * 1e12,
        fp32=bf16 / 2 * 1e12,  # tf32
        int8=int8 * 1e12,
        sparse_int8=2 * int8 * 1e12,
        bandwidth=bandwidth * 1e12,
        node_link=links[0] * 1e9,
        network=links[1] * 1e9,
        keeps=ON_CUDA,
        source=source,
    )


# Networks: one adapter a device, as in NVIDIA's DGX of the same generation (200 Gb/s HDR, then 400 Gb/s NDR).
DEVICES: Mapping[str, Device] = MappingProxyType(
    {
        device.name: device
        for device in (
            _nvidia("a100", 80, (312, 624, 2.039), (300, 25), "NVIDIA A100 80GB SXM data sheet; DGX A100"),
            _nvidia("h100", 80, (989, 1979, 3.35), (450, 50), "NVIDIA H100 SXM data sheet; DGX H100"),
            _nvidia("h200", 141, (989, 1979, 4.8), (450, 50), "NVIDIA H200 SXM data sheet; DGX H200"),
            _nvidia("b200", 180, (2250, 4500, 8.0), (900, 50), "NVIDIA DGX B200 data sheet, an eighth"),
        )
    }
)

CPU = Device("cpu", 0, 0, 1, 1, 1, 1, 1, 1, 1, ON_CPU, "what ranks on CPU keep; no speed is known")


def known_device(product: str) -> Device | None:
    """The device that a driver calls `product` (NVIDIA H100 80GB HBM3); None for others, and for PCIe's slower ones."""
    words = product.lower().replace("-", " ").split()
    if "pcie" in words or "nvl" in words:
        return None
    return next((device for name, device in DEVICES.items() if name in words), None)


def find_device(name: str) -> Device:
    """The device of that name. Raises RecipeError."""
    if name not in DEVICES:
        raise RecipeError(f"--device {name}: is not known; choose one of {', '.join(DEVICES)}")
    return DEVICES[name]
