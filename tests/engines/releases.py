"""The releases that are compared: constraints.txt, and environments that differ from it in one engine."""

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONSTRAINTS = ROOT / "constraints.txt"


@dataclass(frozen=True)
class Releases:
    """An environment by name: what it pins otherwise than constraints.txt, and the oldest Python that takes it."""

    name: str
    pins: tuple[tuple[str, str], ...] = ()
    python: tuple[int, int] = (3, 11)

    def constraints(self) -> str:
        """constraints.txt with these pins in place of its own."""
        changed = dict(self.pins)
        lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if line.partition("==")[0] not in changed]
        return "\n".join([*kept, *(f"{package}=={release}" for package, release in self.pins)]) + "\n"


PINNED = Releases("constraints")
OTHERS = (
    Releases("megatron-core-0.19", (("megatron-core", "0.19.2"),), (3, 12)),
    Releases("torch-2.11", (("torch", "2.11.0"), ("triton", "3.6.0"), ("setuptools", "81.0.0"))),
    Releases("torch-2.14", (("torch", "2.14.1"), ("triton", "3.8.0"))),
)
