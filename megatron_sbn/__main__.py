"""`python -m megatron_sbn`: the `sbn` command."""

import sys

from megatron_sbn.cli import main

if __name__ == "__main__":
    sys.exit(main())
