"""`sbn prepare`: text to token shards."""

import argparse
import sys
from pathlib import Path

from megatron_sbn.cli.options import Commands, add_command, positive
from megatron_sbn.launch.environment import usable_cpus


def prepare(options: argparse.Namespace) -> int:
    """Text to token shards."""
    from megatron_sbn.data import corpus
    from megatron_sbn.data.round_trip import what_is_lost
    from megatron_sbn.engines import check_installed

    check_installed()

    plan = corpus.PrepareOptions(
        inputs=tuple(options.input),
        output=Path(options.output),
        tokenizer=Path(options.tokenizer) if options.tokenizer else None,
        vocab_size=options.vocab_size,
        text_field=options.text_field,
        validation_fraction=options.validation_fraction,
        skip_bad=options.skip_bad,
        seed=options.seed,
        eod=options.eod,
    )
    if corpus.is_prepared(plan):
        print(f"{options.output}: prepared already from the same text with the same settings")
        return 0
    report = corpus.prepare(plan, workers=options.workers)
    for split, (documents, tokens) in report.splits.items():
        print(f"{split}: {documents:,} documents, {tokens:,} tokens")
    for kind, count in sorted(report.skipped.items()):
        print(f"skipped: {count} x {kind}")
    for example in report.examples:
        print(f"  such as {example}")
    for line in report.lost:
        print(f"sbn: warning: left out from here on: {line}", file=sys.stderr)
    lost = what_is_lost(str(plan.model), report.round_trip, report.unknown, report.tokens)
    if lost:
        print(f"sbn: warning: {lost}", file=sys.stderr)
    print("wrote " + " ".join(str(path) for path in report.paths))
    return 0


def add_prepare(commands: Commands) -> None:
    """Its options."""
    command = add_command(commands, "prepare", prepare, "tokenize text into Megatron .bin/.idx shards")
    command.add_argument("--input", nargs="+", required=True, metavar="FILE|GLOB", help="txt, jsonl or parquet")
    command.add_argument("--output", required=True, metavar="PREFIX", help="where the shards go")
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--tokenizer", metavar="MODEL", help="a sentencepiece model or a tokenizer.json")
    source.add_argument("--vocab-size", type=positive, metavar="N", help="train a tokenizer of N pieces first")
    eod = "token that ends documents (default: the model's end of sentence; of a tokenizer.json a usual name)"
    command.add_argument("--eod", metavar="TOKEN", help=eod)
    command.add_argument("--text-field", default="text", help="field or column that holds the text (default: text)")
    command.add_argument("--validation-fraction", type=float, default=0.0, metavar="F", help="documents held out")
    workers = "processes (default: the CPUs that this process or its Slurm job may use)"
    command.add_argument("--workers", type=positive, default=usable_cpus(), help=workers)
    command.add_argument("--skip-bad", action="store_true", help="skip and count bad documents instead of stopping")
    command.add_argument("--seed", type=int, default=0, help="of the split and the tokenizer's sample")
    command.epilog = (
        "example: sbn prepare --input 'corpus/**/*.jsonl' --output data/corpus --vocab-size 32000 "
        "--validation-fraction 0.01"
    )
