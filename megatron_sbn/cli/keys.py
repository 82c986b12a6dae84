"""`sbn keys`: what a recipe may say."""

import argparse
import sys

from megatron_sbn.cli.options import Commands, add_command
from megatron_sbn.errors import RecipeError


def keys(options: argparse.Namespace) -> int:
    """Prints recipe keys."""
    from megatron_sbn.config.keys import markdown, matching, table

    if options.markdown and options.words:
        raise RecipeError("sbn keys --markdown prints all keys; leave the words out, or --markdown")
    if options.markdown:
        sys.stdout.write(markdown())
        return 0
    found = matching(options.words)
    if not found:
        raise RecipeError(f"no recipe key has {' and '.join(options.words)}; sbn keys lists all")
    print(table(found))
    return 0


def add_keys(commands: Commands) -> None:
    """Its options."""
    command = add_command(commands, "keys", keys, "list recipe keys: values, default, meaning")
    command.add_argument("words", nargs="*", metavar="WORD", help="keys with these words in name, values or meaning")
    command.add_argument("--markdown", action="store_true", help="all of them as docs/recipe.md")
    command.epilog = "example: sbn keys optimizer\n         sbn keys mask"
