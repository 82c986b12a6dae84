"""What a run says on rank 0: a progress bar on a terminal, plain lines otherwise, and both kept in logs/rank-0.log."""

import sys
import time
from pathlib import Path

from tqdm import tqdm

from megatron_sbn.text_table import clock
from megatron_sbn.training.step import StepResult


class Eta:
    """The remaining time, by this job's pace since its first step: that one makes and measures what later ones use.

    Validation, telemetry and checkpoints are part of the pace.
    """

    def __init__(self, first: int, last: int) -> None:
        self._first, self._last = first, last
        self._after_first: float | None = None

    def note(self, done: int) -> str:
        """`done` steps are done now; returns h:mm:ss, or "?" after this job's first step."""
        now = time.monotonic()
        if self._after_first is None or done <= self._first + 1:
            self._after_first = now
            return "0:00:00" if done == self._last else "?"
        return clock((now - self._after_first) / (done - self._first - 1) * (self._last - done))


class Console:
    """Prints on rank 0 only; everywhere else it does nothing.

    Args:
        log: file that keeps every line.
        last: number of the last step.
        speaks: whether this is rank 0.
    """

    def __init__(self, log: Path, last: int, speaks: bool) -> None:
        self.speaks = speaks
        self.last = last
        self._eta = Eta(0, last)
        self._log = log.open("a", encoding="utf-8") if speaks else None
        self._bar: tqdm | None = None

    def begin(self, first: int) -> None:
        """Steps follow, after `first` that are done: the bar and the remaining time count from here."""
        self._eta = Eta(first, self.last)
        if self._log is not None and sys.stderr.isatty():
            # tqdm's own remaining time counts the slow first step.
            shown = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
            self._bar = tqdm(total=self.last, initial=first, dynamic_ncols=True, bar_format=shown)

    def say(self, text: str) -> None:
        """A line of its own, above the bar where there is one."""
        if self._log is None:
            return
        self._log.write(text + "\n")
        self._log.flush()
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def step(
        self, step: int, result: StepResult, tokens_per_second: float, logged: bool, mfu: float | None = None
    ) -> None:
        """One step is done; `logged`: it gets a line. `mfu`: its model FLOP/s over the devices' peak, if known."""
        if self._log is None:
            return
        shown = f"loss {result.loss:.6f}  grad_norm {result.grad_norm:.4f}  lr {result.lr:.3e}"
        rate = f"{tokens_per_second:,.0f} tokens/s" + (f"  mfu {mfu:.1%}" if mfu is not None else "")
        eta = self._eta.note(step)
        if self._bar is not None:
            self._bar.set_postfix_str(f"eta {eta}, loss {result.loss:.3f}, {rate}", refresh=False)
            self._bar.update(1)
        if not logged:
            return
        line = f"step {step}/{self.last}  {shown}  {rate}  eta {eta}"
        self._log.write(line + "\n")
        self._log.flush()
        if self._bar is None:
            print(line, flush=True)

    def close(self) -> None:
        """Ends the bar and the log."""
        if self._bar is not None:
            self._bar.close()
        if self._log is not None:
            self._log.close()
