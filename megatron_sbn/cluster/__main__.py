"""What slurm/job.sh starts: job.py, or one line where this Python cannot import it. Older Pythons can read this."""

import platform
import sys


def main() -> int:
    """Runs an action; returns its exit status: 2 where it cannot be run, which is never tried again."""
    wrong = ""
    if sys.version_info < (3, 11):  # noqa: UP036 - said in one line
        wrong = f"is Python {platform.python_version()}, and megatron_sbn needs 3.11 or newer"
    else:
        try:
            from megatron_sbn.cluster import job
        except ImportError as error:
            wrong = f"cannot import megatron_sbn ({error})"
    if wrong:
        way_out = "submit with the Python of `make setup`, or set SBN_PYTHON in slurm/env.sh"
        print(f"sbn: {sys.executable} on {platform.node()} {wrong}; {way_out}", file=sys.stderr, flush=True)
        return 2
    return job.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
