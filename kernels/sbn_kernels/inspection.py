"""What the compiler made of every kernel, without a GPU: registers, shared memory, spills, matrix instructions.

    python -m sbn_kernels.inspection [--architectures 80 90 100 120] [--kernel NAME]

compiles every `Build` that the kernel modules declare for machines that need not be there, reads the machine code back
and prints one line a build and architecture; exit status 1 if one spills, breaks a limit of the hardware, or lacks the
matrix instruction that it was written for. Kernels run interpreted on CPU prove the arithmetic; this proves that the
arithmetic landed on the tensor cores.
"""

import argparse
import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (80, 90, 100, 120)
"""Compute capabilities, times ten: A100, H100/H200, B200, RTX 50."""

SHARED_LIMIT = MappingProxyType({80: 166912, 90: 232448, 100: 232448, 120: 101376})
"""Bytes of shared memory one block may use (CUDA C++ Programming Guide, table of compute capabilities)."""

REGISTER_FILE = 65536
TCGEN05_INT8 = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 8)
"""Whether int8 GEMMs for sm_100 become tcgen05; before 3.8 Triton has none of that kind and takes mma.sync."""

INT8_MMA = MappingProxyType({80: r"IMMA", 90: r"IGMMA", 100: r"UTC\w*IMMA" if TCGEN05_INT8 else r"IMMA", 120: r"IMMA"})
"""SASS names of int8 matrix instructions: mma.sync, wgmma, tcgen05."""

FLOAT16_MMA = MappingProxyType({80: r"HMMA", 90: r"HGMMA", 100: r"UTC\w*HMMA", 120: r"HMMA"})
"""SASS names of bf16 and fp16 matrix instructions."""

_MODULES: tuple[str, ...] = (
    "gpu.quantize.activation_quantize",
    "gpu.quantize.gradient_quantize",
    "gpu.accumulator_scale",
    "gpu.quantize.rms_norm_quantize",
    "gpu.quantize.swiglu_quantize",
    "gpu.cross_entropy",
    "gpu.weights.weight_sums",
    "gpu.weights.weight_prepare",
    "gpu.gemm.ternary_gemm",
    "gpu.gemm.wgmma_gemm",
    "gpu.primitives.transpose",
    "gpu.gemm.ternary_dgrad",
    "gpu.gemm.ternary_wgrad",
    "formats.planes",
    "gpu.gemm.planes_gemm",
    "formats.two_four",
    "gpu.gemm.sparse_gemm",
    "gpu.gemm.sliding_window",
    "gpu.decode.decode",
)


@dataclass(frozen=True)
class Build:
    """One specialisation of one kernel that is compiled and inspected.

    Attributes:
        name: the kernel's file, and in brackets what is special: "ternary_gemm[int8 128x256]".
        function: a `@triton.jit` or `@gluon.jit` function, not interpreted.
        signature: argument -> Triton type ("*i8", "*bf16", "*fp32", "i32"), in order; constexprs are left out.
        constexprs: argument -> value.
        num_warps, num_stages: as launched.
        fusion: whether a * b + c may become one rounding (`enable_fp_fusion`).
        instruction: architecture -> pattern that must be found in the machine code; empty for kernels that are bound
            by memory. An architecture that is missing is not compiled, unless the mapping is empty.
        aligned: arguments that are multiples of 16 (pointers always are).
        ptx: pattern that must be found in the PTX, where `.` is also a line's end; empty: none.
    """

    name: str
    function: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    fusion: bool = True
    instruction: Mapping[int, str] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()
    ptx: str = ""


@dataclass(frozen=True)
class Report:
    """What one build became on one architecture.

    Attributes:
        registers: per thread.
        shared: bytes a block.
        spills: local-memory loads and stores in the machine code.
        stack: bytes of local memory a thread.
        found: matrix instructions in the machine code, sorted.
        complaints: what is wrong; empty if nothing is.
    """

    build: Build
    architecture: int
    registers: int
    shared: int
    spills: int
    stack: int
    found: tuple[str, ...]
    complaints: tuple[str, ...]


def all_builds() -> Iterator[Build]:
    """The `BUILDS` of every kernel module."""
    for module in _MODULES:
        yield from importlib.import_module(f"sbn_kernels.{module}").BUILDS


def _source(build: Build) -> Any:  # noqa: ANN401
    names = list(build.function.arg_names)
    signature = {name: "constexpr" if name in build.constexprs else build.signature[name] for name in names}
    constexprs = {name: value for name, value in build.constexprs.items() if name in names}
    aligned = [name for name, kind in signature.items() if kind.startswith("*") or name in build.aligned]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    if build.function.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        return GluonASTSource(build.function, signature, constexprs, attributes)
    return ASTSource(build.function, signature, constexprs, attributes)


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """Resource usage and machine code, as the text of NVIDIA's cuobjdump that Triton brings along."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        texts = [
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        ]
    return texts[0], texts[1]


def inspect_build(build: Build, architecture: int) -> Report:
    """Compiles a build for an architecture and reads the machine code back."""
    compiled = triton.compile(
        _source(build),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": build.num_warps, "num_stages": build.num_stages, "enable_fp_fusion": build.fusion},
    )
    usage, code = _disassemble(compiled.asm["cubin"])
    registers = max(int(n) for n in re.findall(r"REG:(\d+)", usage))
    stack = max(int(n) for n in re.findall(r"STACK:(\d+)", usage))
    spills = len(re.findall(r"\b(?:STL|LDL)\b", code))
    found = tuple(sorted(set(re.findall(r"\b(?:[IHQDUTC]\w*MMA)(?:\.[\w.]+)?", code))))
    shared = int(compiled.metadata.shared)
    wanted = build.instruction.get(architecture)
    complaints = []
    if spills or stack:
        complaints.append(f"{spills} spill instructions, {stack} bytes of stack")
    if shared > SHARED_LIMIT[architecture]:
        complaints.append(f"{shared} bytes of shared memory, {SHARED_LIMIT[architecture]} are there")
    if registers * build.num_warps * 32 > REGISTER_FILE:
        complaints.append(f"{registers} registers x {build.num_warps * 32} threads exceed {REGISTER_FILE}")
    if wanted is not None and not any(re.search(wanted, name) for name in found):
        complaints.append(f"no {wanted}")
    if not re.search(build.ptx, compiled.asm["ptx"], re.DOTALL):
        complaints.append(f"PTX without {build.ptx}")
    return Report(build, architecture, registers, shared, spills, stack, found, tuple(complaints))


def inspect_all(builds: Iterable[Build], architectures: Iterable[int] = ARCHITECTURES) -> Iterator[Report]:
    """Reports of every build on every architecture that it is for, two compilations at a time."""
    pairs = [(b, a) for b in builds for a in architectures if not b.instruction or a in b.instruction]
    with ThreadPoolExecutor(max_workers=2) as pool:
        yield from pool.map(lambda pair: inspect_build(*pair), pairs)


def _line(report: Report) -> str:
    verdict = "; ".join(report.complaints) or "ok"
    instructions = ", ".join(report.found) or "-"
    return (
        f"{report.build.name:<44} sm_{report.architecture:<4} {report.registers:>4} {report.shared:>8} "
        f"{report.spills:>7} {verdict:<12} {instructions}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; 1 if a build breaks a rule."""
    parser = argparse.ArgumentParser(prog="python -m sbn_kernels.inspection", description=__doc__.partition("\n")[0])
    parser.add_argument("--architectures", type=int, nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--kernel", default="", help="only builds whose name starts with this")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 leaves nothing to compile: unset it")
    builds = [build for build in all_builds() if build.name.startswith(options.kernel)]
    if not builds:
        parser.error(f"--kernel {options.kernel!r}: no build's name starts with it")
    print(f"{'kernel':<44} {'arch':<7} {'regs':>4} {'shared':>8} {'spills':>7} {'verdict':<12} matrix instructions")
    failed = 0
    for report in inspect_all(builds, options.architectures):
        print(_line(report), flush=True)
        failed += bool(report.complaints)
    print(f"{failed} of these break a rule" if failed else "no spills, all limits kept, all matrix instructions there")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
