"""`python -m megatron_sbn.cli`: the same as `sbn`."""

import sys

from megatron_sbn.cli.main import main

if __name__ == "__main__":  # the workers of `sbn prepare` import this module again
    sys.exit(main())
