"""What a run says on rank 0: a progress bar on a terminal, plain lines otherwise, and both kept in logs/rank-0.log."""

import sys
import time
from pathlib import Path

from tqdm import tqdm

from megatron_sbn.text_table import clock
from megatron_sbn.training.step import StepResult


class Console:
    """Prints on rank 0 only; everywhere else it does nothing.

    Args:
        log: file that keeps every line.
        last: number of the last step.
        speaks: whether this is rank 0.
    """

    def __init__(self, log: Path, last: int, speaks: bool) -> None:
        self.speaks = speaks
        self.first, self.last = 0, last
        self._began = time.monotonic()
        self._log = log.open("a", encoding="utf-8") if speaks else None
        self._bar: tqdm | None = None

    def begin(self, first: int) -> None:
        """Steps follow, after `first` that are done: the bar and the expected time count from here."""
        self.first, self._began = first, time.monotonic()
        if self._log is not None and sys.stderr.isatty():
            self._bar = tqdm(total=self.last, initial=first, unit="step", dynamic_ncols=True)

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

    def step(self, step: int, result: StepResult, tokens_per_second: float, logged: bool) -> None:
        """One step is done; `logged` says whether it is one of those that get a line."""
        if self._log is None:
            return
        shown = f"loss {result.loss:.6f}  grad_norm {result.grad_norm:.4f}  lr {result.lr:.3e}"
        rate = f"{tokens_per_second:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {result.loss:.3f}, {rate}", refresh=False)
            self._bar.update(1)
        if not logged:
            return
        line = f"step {step}/{self.last}  {shown}  {rate}  eta {self._eta(step)}"
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

    def _eta(self, step: int) -> str:
        done = step - self.first
        seconds = (time.monotonic() - self._began) / max(1, done) * (self.last - step)
        return clock(seconds)
