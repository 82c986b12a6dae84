"""The folder of a run's checkpoints: which are there, which is in force, whether one is valid, which are removed.

    checkpoints/step-00000100/       manifest.json, state.json, shard-RRRRR-K.safetensors
    checkpoints/latest               text: the name of the one in force
    checkpoints/.step-....partial    being written; .step-....removed: being removed. Nothing reads them

A checkpoint appears under its name whole, by a rename; `latest` is replaced after that. Where the one that `latest`
names is not valid, the one before it is used; later ones are not, for they belong to a run that was given up, and are
removed when the run has saved what is to be kept, or passes them.
Imports no torch.
"""

import hashlib
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from megatron_sbn.atomic_files import write_atomically
from megatron_sbn.checkpoint.manifest import Manifest, read_manifest, read_state
from megatron_sbn.errors import CheckpointError
from megatron_sbn.runs.folder import CHECKPOINTS

LATEST = "latest"
PARTIAL, REMOVED = ".partial", ".removed"
_NAME = re.compile(r"step-[0-9]{1,18}")


def step_name(step: int) -> str:
    """step-00000100."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """The step in a checkpoint's name; None for another name."""
    return int(path.name.removeprefix("step-")) if _NAME.fullmatch(path.name) else None


def saved(folder: Path) -> list[Path]:
    """The checkpoints by their names, newest first; whether they are valid is not looked at."""
    try:
        found = [path for path in folder.iterdir() if step_of(path) is not None and path.is_dir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error.strerror or error}") from None
    return sorted(found, key=lambda path: step_of(path) or 0, reverse=True)


def pointed(folder: Path) -> Path | None:
    """The checkpoint that `latest` names; None where there is no `latest`, or what it says is no checkpoint's name."""
    try:
        name = (folder / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    path = folder / name
    return path if Path(name).name == name and step_of(path) is not None else None


def candidates(folder: Path) -> list[Path]:
    """The checkpoints to try, in this order: the one that `latest` names and those before it; all, without `latest`."""
    everything = saved(folder)
    latest = pointed(folder)
    if latest is None:
        return everything
    limit = step_of(latest) or 0
    return [path for path in everything if (step_of(path) or 0) <= limit]


def holds_any(folder: Path) -> bool:
    """Whether something was saved here, valid or not."""
    return bool(saved(folder)) or (folder / LATEST).exists()


def newest(folder: Path) -> Path | None:
    """The checkpoint in force, by its name; None where there is none."""
    return next(iter(candidates(folder)), None)


def saved_step(run: Path) -> int:
    """The step of the checkpoint that a run folder's `latest` names; 0 where there is none."""
    latest = pointed(run / CHECKPOINTS)
    return (step_of(latest) or 0) if latest is not None else 0


def check_files(path: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Raises CheckpointError, naming the first of these files that is not what the manifest says."""
    for name in names:
        file, expected = path / name, manifest.files[name]
        try:
            size = file.stat().st_size
            if size != expected.bytes:
                raise CheckpointError(f"{file}: has {size} bytes, and {expected.bytes} were saved")
            with file.open("rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from None
        if digest != expected.sha256:
            raise CheckpointError(f"{file}: its content is not what was saved (SHA-256 differs)")


def verify(path: Path) -> Manifest:
    """Checks every file of a checkpoint. Raises CheckpointError, naming the first that is not valid."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: is no folder; name a checkpoint, or a run")
    manifest = read_manifest(path)
    check_files(path, manifest, sorted(manifest.files))
    step = read_state(path).step
    if step_of(path) not in (None, step):
        raise CheckpointError(f"{path}: holds step {step}; give it its own name back")
    return manifest


def partial(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is written before it gets its name."""
    return folder / f".{step_name(step)}{PARTIAL}"


def begin(folder: Path, step: int) -> Path:
    """An empty folder for the checkpoint of a step; what killed runs left is removed. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    clean(folder)
    path = partial(folder, step)
    path.mkdir()
    return path


def clean(folder: Path) -> None:
    """Removes what a killed run left half written or half removed. Raises OSError."""
    for ending in (PARTIAL, REMOVED):
        for stale in folder.glob(f".step-*{ending}"):
            shutil.rmtree(stale)
    (folder / f".{LATEST}{PARTIAL}").unlink(missing_ok=True)


def publish(folder: Path, step: int, after: int | None = None) -> Path:
    """Gives the written checkpoint its name, then names it in `latest`. Raises OSError, InputError.

    With `after`, the step of the checkpoint that the run went on from, those between the two are of a run that was
    given up, and are removed while `latest` still names an earlier one: behind a later one they would be tried.
    """
    final = folder / step_name(step)
    if after is not None:
        for given_up in saved(folder):
            if after < (step_of(given_up) or 0) < step:
                _remove(given_up)
    if final.exists():
        _remove(final)
    partial(folder, step).rename(final)
    set_latest(folder, step)
    return final


def set_latest(folder: Path, step: int) -> None:
    """Puts the checkpoint of a step in force. Raises InputError."""
    write_atomically(folder / LATEST, f"{step_name(step)}\n".encode())


def prune(folder: Path, keep: int, keep_every: int) -> None:
    """Removes all but the newest `keep`, and those whose step is a multiple of `keep_every` (0: none). Raises OSError.

    The one that `latest` names and those before it come first, even where a run went back and continued from an older
    one: later ones are of no use to it.
    """
    useful = candidates(folder)
    later = [path for path in saved(folder) if path not in useful]
    for old in [*useful, *later][keep:]:
        if not keep_every or (step_of(old) or 0) % keep_every:
            _remove(old)


def discard(folder: Path, step: int) -> None:
    """Removes what was written of a checkpoint that could not be finished."""
    shutil.rmtree(partial(folder, step), ignore_errors=True)


def _remove(path: Path) -> None:
    """Takes the name away first: what is left of a removal that is cut short is no checkpoint."""
    hidden = path.with_name(f".{path.name}{REMOVED}")
    if hidden.exists():
        shutil.rmtree(hidden)
    path.rename(hidden)
    shutil.rmtree(hidden)
