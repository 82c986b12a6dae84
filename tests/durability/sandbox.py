"""One case of bad input: run through a real entry point in a forked process, and judged.

A case is right if it works or ends with one line for people and a documented status. It is wrong if it
- shows a traceback, says more or less than one line, or ends with another status,
- hangs (the stack is shown), works too long, or is killed by a signal,
- writes, renames or removes anything outside its own folder (Python's audit hook, and a tree beside it),
- starts a program that is not known, or lets a planted command run,
- shows or stores a planted secret.
"""

import faulthandler
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any
from unittest import mock

SECRET = "hush-1f9c"
"""In every planted password and token."""
CANARY = "canary-was-run"
"""Name of the file that a planted command makes in the case's folder."""
SECONDS, PROCESSOR_SECONDS = 600, 20  # of a clock, for a machine that does more; of a processor
MEMORY = 4 << 30  # beyond what the process has when it starts
STATUSES = (0, 1, 2, 3, 4, 75)
TRACEBACK_STATUS = 70
NOTHING_TO_DO = 10  # an exit status for batch scripts
PROGRAMS = (
    "git",
    "bash",
    "squeue",
    "sinfo",
    "uname",
    "ldconfig",
    "gcc",
)  # gcc: DeepSpeed looks which libraries there are
LONGEST_LINE = 2000
ENVIRONMENT = {
    "MLFLOW_TRACKING_USERNAME": "someone",
    "MLFLOW_TRACKING_PASSWORD": f"{SECRET}-password",
    "MLFLOW_TRACKING_TOKEN": f"{SECRET}-token",
    "DATABASE_URL": f"postgresql://someone:{SECRET}-database@127.0.0.1/runs",
    "AWS_SECRET_ACCESS_KEY": f"{SECRET}-aws",
}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_CHANGES = {  # audit event -> which of its arguments are paths that change
    "os.rename": (0, 1),
    "os.mkdir": (0,),
    "os.remove": (0,),
    "os.rmdir": (0,),
    "os.symlink": (1,),
    "os.link": (1,),
    "os.truncate": (0,),
    "os.chmod": (0,),
    "shutil.rmtree": (0,),
    "sqlite3.connect": (0,),
}


@dataclass(frozen=True)
class Case:
    """Words for an entry point: "cli" (sbn), "train" (a rank) or "job" (what batch scripts ask).

    Attributes:
        stops: for "train", whether it ends where the engines would be imported.
        alone: whether it may run in a process of its own, with nothing replaced: it starts no training.
    """

    kind: str
    entry: str
    words: tuple[str, ...]
    stops: bool = True
    alone: bool = True


@dataclass(frozen=True)
class Verdict:
    """What became of a case; `wrong` is "" where all is well."""

    status: int
    wrong: str
    said: str


class Sandbox:
    """Folders and rules for the cases of one campaign.

    folder/case/     the case's own: files/ (its input), cwd/ (where it runs), home/, tmp/
    folder/beside/   must stay as it is
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.case = folder / "case"
        self._beside = folder / "beside"
        self._beside.mkdir(parents=True)
        (self._beside / "precious.yaml").write_text("name: precious\n")
        self._tree = _tree(self._beside)

    def prepare(self) -> Path:
        """Empties the case's folder; returns where its input goes."""
        if self.case.exists():
            shutil.rmtree(self.case)
        for name in ("files", "cwd", "home", "tmp"):
            (self.case / name).mkdir(parents=True)
        return self.case / "files"

    def run(self, case: Case) -> Verdict:
        """In a fork of this process."""
        before = _tree(self.case)
        pid = os.fork()
        if pid == 0:
            self._child(case)
        _, state, usage = os.wait4(pid, 0)
        verdict = self._judge(case, state, before)
        took = usage.ru_utime + usage.ru_stime
        if took > PROCESSOR_SECONDS and not verdict.wrong:
            return replace(verdict, wrong=f"takes {took:.0f} s of a processor")
        return verdict

    def run_alone(self, case: Case) -> Verdict:
        """As a process of its own."""
        before = _tree(self.case)
        modules = {"cli": "megatron_sbn.cli", "train": "megatron_sbn.train", "job": "megatron_sbn.cluster.job"}
        words = [word.replace("\0", "") for word in case.words]  # no process can be given one
        command = [sys.executable, "-m", modules[case.entry], *words]
        with (self.case / "stdout").open("wb") as out, (self.case / "stderr").open("wb") as err:
            try:
                done = subprocess.run(
                    command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=self.case / "cwd",
                    env=os.environ | self._environment(), timeout=2 * SECONDS, check=False,
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                return Verdict(-1, "hangs", self._said())
        state = -done.returncode if done.returncode < 0 else done.returncode << 8
        (self.case / "violations").touch()
        (self.case / "stack").touch()
        return self._judge(case, state, before)

    def _environment(self) -> dict[str, str]:
        places = {
            "HOME": "home",
            "TMPDIR": "tmp",
            "TORCHINDUCTOR_CACHE_DIR": "tmp/torch",
            "SBN_KERNELS_CACHE": "tmp/sbn",
        }
        return ENVIRONMENT | {name: str(self.case / place) for name, place in places.items()}

    def _child(self, case: Case) -> None:
        """Never returns."""
        os.environ |= self._environment()
        os.chdir(self.case / "cwd")
        out = os.open(self.case / "stdout", os.O_WRONLY | os.O_CREAT)
        err = os.open(self.case / "stderr", os.O_WRONLY | os.O_CREAT)
        violations = os.open(self.case / "violations", os.O_WRONLY | os.O_CREAT)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - the descriptor itself
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        stack = open(self.case / "stack", "w")  # noqa: SIM115, PTH123 - for the life of this process
        faulthandler.enable(file=stack)
        faulthandler.dump_traceback_later(SECONDS, exit=True, file=stack)
        limit_memory()
        tempfile.tempdir = str(self.case / "tmp")
        sys.addaudithook(_auditor(self.case, violations))
        with _Ending() as ending:
            ending.status = _enter(case)

    def _judge(self, case: Case, state: int, before: dict[str, tuple[int, int]]) -> Verdict:
        said = self._said()
        stack = (self.case / "stack").read_text()
        status = os.waitstatus_to_exitcode(state)
        wrong = ""
        if stack.startswith("Timeout"):
            wrong = f"hangs: {_innermost(stack)}"
        elif status < 0:
            wrong = f"killed by {signal.Signals(-status).name}{': ' + _innermost(stack) if stack else ''}"
        elif "Traceback (most recent call last)" in said:
            wrong = f"traceback: {_last_error(said)}"
        elif status not in STATUSES and not (status == NOTHING_TO_DO and case.entry == "job"):
            wrong = f"status {status}"
        else:
            wrong = _wrong_words(status, (self.case / "stderr").read_bytes(), silent=case.entry == "job")
        wrong = wrong or next(self._wrong_deeds(before), "")
        return Verdict(status, wrong, said)

    def _wrong_deeds(self, before: dict[str, tuple[int, int]]) -> Iterator[str]:
        violation = (self.case / "violations").read_text().partition("\n")[0]
        if violation:
            yield violation
        if _tree(self._beside) != self._tree:
            yield "changes files beside its folder"
        after = _tree(self.case)
        if any(CANARY in name for name in after):
            yield "runs a planted command"
        for name in after:
            if after[name] != before.get(name) and name not in ("violations", "stack"):
                path = self.case / name
                if path.is_file() and SECRET.encode() in path.read_bytes():
                    yield f"shows a secret in {name}"

    def _said(self) -> str:
        paths = [self.case / name for name in ("stdout", "stderr")]
        return "".join(path.read_bytes().decode(errors="replace") for path in paths if path.exists())


def limit_memory() -> None:
    """Lets this process, and those it starts, have at most MEMORY more than it has now: then a MemoryError tells."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))


class _Ending:
    """Ends the process with the body's status, or the traceback of whatever it raises: that is what is looked for."""

    status = TRACEBACK_STATUS

    def __enter__(self) -> "_Ending":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if isinstance(error, SystemExit):
            self.status = error.code if isinstance(error.code, int) else 1
        elif error is not None:
            traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(self.status)


def _enter(case: Case) -> int:
    """The entry point's status; launching ranks, and training where the case stops, are left out."""
    from megatron_sbn import cli, train
    from megatron_sbn.cluster import job

    words = list(case.words)
    with mock.patch("megatron_sbn.launch.launch", return_value=0):
        if case.entry == "cli":
            return cli.main(words)
        if case.entry == "job":
            return job.main(words)
        if case.stops:
            with mock.patch.object(train, "_train", return_value=0):
                return train.main(words)
        return train.main(words)


def _auditor(own: Path, violations: int) -> Callable[[str, tuple[Any, ...]], None]:
    """Tells of what is changed outside `own`, and of programs that are started."""
    inside = f"{own}{os.sep}"

    def allowed(path: object, follow: bool) -> bool:
        if isinstance(path, int) or path is None:
            return True  # a descriptor, which has been opened already
        text = os.fsdecode(path)  # type: ignore[arg-type]
        # A link is removed or renamed itself.
        folder, name = os.path.split(os.path.abspath(text))  # noqa: PTH100
        real = os.path.realpath(text) if follow else os.path.join(os.path.realpath(folder), name)  # noqa: PTH118
        return f"{real}{os.sep}".startswith(inside) or real == os.devnull

    def outside(event: str, arguments: tuple[Any, ...]) -> Iterator[object]:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES
        if writes and not allowed(arguments[0], follow=True):
            yield arguments[0]
        for index in _CHANGES.get(event, ()):
            # os.unlink(name, dir_fd=folder): the folder was judged when it was opened for removal.
            relative = isinstance(arguments[-1], int) and arguments[-1] >= 0
            if not relative and not allowed(arguments[index], follow=event in ("sqlite3.connect", "os.chmod")):
                yield arguments[index]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        for path in outside(event, arguments):
            os.write(violations, f"{event} {path!r}\n".encode(errors="replace"))
        started = event == "subprocess.Popen" and Path(os.fsdecode(arguments[0])).name not in PROGRAMS
        if started or event in ("os.system", "os.exec", "os.posix_spawn", "pty.spawn"):
            os.write(violations, f"starts {arguments[0]!r}\n".encode(errors="replace"))

    return hook


def _wrong_words(status: int, stderr: bytes, silent: bool) -> str:
    """What is wrong with what a command says; `silent` ones may have a status without a message."""
    lines = [line for line in re.split(rb"\r\n|[\r\n]", stderr) if line]
    if lines and lines[0].startswith(b"usage: ") and status == 2 and b": error: " in lines[-1]:
        lines = [b"sbn: " + lines[-1]]  # argparse's own two
    own = [line for line in lines if line.startswith(b"sbn: ")]
    others = [line for line in lines if line not in own and not re.match(rb"[a-z ]+: \d+% of ", line)]
    if others and status:
        return f"says more than its line: {others[0][:200]!r}"
    if status and len(own) != 1 and not (silent and not own):
        return f"says {len(own)} lines for status {status}"
    if any(len(line) > LONGEST_LINE for line in own):
        return f"says {max(map(len, own))} characters: {own[0][:100]!r}"
    if re.search(rb"[\x00-\x08\x0b-\x1f\x7f]", b"".join(own)):
        return f"says control characters: {own[0][:200]!r}"
    return ""


def _last_error(said: str) -> str:
    """The traceback's last line, with the innermost line of this project."""
    lines = said[said.rindex("Traceback (most recent call last)") :].splitlines()
    own = [line.strip() for line in lines if "/megatron_sbn/" in line or "/sbn_kernels/" in line]
    last = next((line for line in reversed(lines) if line and not line.startswith(" ")), "")
    return f"{last[:200]} at {own[-1] if own else '?'}"


def _innermost(stack: str) -> str:
    """This project's innermost line of the main thread, which comes last."""
    lines = stack[stack.rindex("Thread 0x") if "Thread 0x" in stack else 0 :].splitlines()
    own = [line.strip() for line in lines if "/megatron_sbn/" in line]
    return own[0] if own else lines[-1]


def _tree(folder: Path) -> dict[str, tuple[int, int]]:
    """{path: (size, time of change)} of everything below a folder."""
    found = {}
    for root, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(root) / name
            status = path.lstat()
            size = 0 if path.is_dir() else status.st_size
            found[str(path.relative_to(folder))] = (size, 0 if path.is_dir() else status.st_mtime_ns)
    return found
