"""A copy of the code that a job runs, so that later edits change no job that waits or starts again.

In a checkout: every file that git lists, tracked or new, but not ignored. Outside one: the installed package, and the
batch scripts that were installed with it. Both have the layout of a checkout:

    megatron_sbn/  kernels/sbn_kernels/  slurm/  .sbn-commit (provenance.py reads it where there is no git)

Imports no torch.
"""

import importlib.metadata
import importlib.util
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from megatron_sbn.errors import InputError
from megatron_sbn.runs.provenance import COMMIT_FILE, code_commit

MOST_BYTES = 256 << 20


@dataclass(frozen=True)
class Snapshot:
    """What would be copied: `files` is (where it is, its path in the copy); `scripts` the folder of batch scripts."""

    files: tuple[tuple[Path, Path], ...]
    scripts: Path
    commit: str | None

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(source.stat().st_size for source, _ in self.files)

    def write(self, folder: Path) -> None:
        """Copies the files. Raises InputError where one cannot be."""
        try:
            for source, path in self.files:
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, folder / path)
            if self.commit is not None:
                (folder / COMMIT_FILE).write_text(f"{self.commit}\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"{folder}: the code cannot be copied there: {error.strerror or error}") from error


def find_code() -> Snapshot:
    """The code that runs now. Raises InputError where it is too large or has no batch scripts."""
    root = Path(__file__).parents[2]
    listed = _listed(root)
    if listed:
        files = [(root / path, path) for path in listed if (root / path).is_file()]
        scripts = root / "slurm"
    else:
        files, scripts = _installed()
    if not (scripts / "train.sbatch").is_file():
        raise InputError(f"{scripts}: no train.sbatch there; install megatron_sbn again, or submit from a checkout")
    snapshot = Snapshot(tuple(files), scripts, code_commit())
    if snapshot.size > MOST_BYTES:
        largest, _ = max(files, key=lambda file: file[0].stat().st_size)
        raise InputError(
            f"{root}: {snapshot.size >> 20} MiB of code to copy, at most {MOST_BYTES >> 20}; "
            f"is {largest} code? Name it in .gitignore or move it"
        )
    return snapshot


def _listed(root: Path) -> list[Path]:
    """What git lists if the package is part of a checkout at `root`; else nothing."""
    git = ["git", "-C", str(root), "ls-files", "-z"]
    try:
        subprocess.run([*git, "--error-unmatch", "megatron_sbn/__init__.py"], capture_output=True, check=True)
        command = [*git, "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return sorted({Path(name) for name in names.split("\0") if name})


def _installed_scripts() -> Path | None:
    """Where setup.py's data_files went."""
    try:
        installed = importlib.metadata.files("megatron-sbn") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())).resolve().parent for file in installed if file.name == "train.sbatch"), None)


def _installed() -> tuple[list[tuple[Path, Path]], Path]:
    """The installed packages and scripts; in a copy that this module made, those of the copy."""
    package = Path(__file__).parents[1]
    packages = [(package, Path("megatron_sbn"))]
    kernels = importlib.util.find_spec("sbn_kernels")
    if kernels is not None and kernels.origin is not None:
        packages.append((Path(kernels.origin).parent, Path("kernels/sbn_kernels")))
    scripts = package.parent / "slurm"
    if not scripts.is_dir():
        scripts = _installed_scripts() or scripts
    files = []
    for folder, name in [*packages, (scripts, Path("slurm"))]:
        found = sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        files += [(path, name / path.relative_to(folder)) for path in found]
    return files, scripts
