"""The `sbn` command: main parses, and each other module has some of the subcommands with their options."""

from megatron_sbn.cli.main import main

__all__ = ["main"]
