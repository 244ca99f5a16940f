"""What the commands that make many runs have in common: their words, their table, their end."""

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

PASSED = ("--trainer.", "--model.", "--data.")


def new_parser(prog: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """A parser with the words that all of them have.

    Args:
        prog: How the command is called.
        description: Of its help.
        epilog: After its arguments.

    Returns:
        The parser.
    """
    own = argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    own.add_argument("--data.data_dir", dest="data_dir", metavar="DIR", help="folder of the images")
    own.add_argument("--out", type=Path, metavar="FOLDER", help="where results/, logs/ and table.md go")
    own.add_argument("--table", action="store_true", help="print the table of the files in OUT/results, and no more")
    return own


def parse(command: argparse.ArgumentParser, words: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The command's own arguments, and the words for every run's config; a word that is neither ends the process.

    Args:
        command: The parser.
        words: Of the command line; None for sys.argv.

    Returns:
        The two.
    """
    given, overrides = command.parse_known_args(words)
    wrong = [word for word in overrides if word.startswith("-") and not word.startswith(PASSED)]
    if wrong or (overrides and not overrides[0].startswith(PASSED)):
        command.error(f"unknown: {' '.join(wrong or overrides)}")
    return given, overrides


def run_to_the_end(main: Callable[[], int]) -> None:
    """Run a command and exit with its status, or 130 after Ctrl-C; a SIGTERM ends the run in progress too.

    Args:
        main: The command.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nstopped; the same words go on", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
