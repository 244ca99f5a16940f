"""Parsers of the commands that read no config of a run."""

import inspect
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from docstring_parser import parse
from jsonargparse import ActionYesNo, ArgumentParser

from simo_lightning.extras import missing_extra
from simo_lightning.parser import in_one_line, user_error

# Modules of this package by the name of their command, with what the command does.
COMMANDS: dict[str, str] = {
    "compare": "Show the reports of two or more runs side by side in one HTML file.",
    "embed": "Write the embeddings of image files to a Parquet or .npz file.",
    "explain": "Show which classes an image leans to, its nearest images, and where in it a similarity comes from.",
    "export": "Write the encoder of a checkpoint as ONNX or .pt2, and check the file.",
    "pack": "Pack a folder of images, or those of a table, into a few large files for training.",
    "search": "Find the nearest images of a file of embeddings.",
    "share": "Write a model as a folder with a model card, and upload it to the Hugging Face Hub.",
}


class CommandParser(ArgumentParser):
    """jsonargparse's parser with errors of one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End the command.

        Args:
            message: Multi-line message of jsonargparse.
            ex: Exception that caused it.

        Raises:
            SystemExit: With status 2.
        """
        line = missing_extra(message) or f"{in_one_line(message)} ({self.prog} --help lists the arguments)"
        print(f"{self.prog}: error: {line}", file=sys.stderr)
        raise SystemExit(2)


def command_parser(name: str) -> CommandParser:
    """The parser of a command, with the arguments of its function ``run`` and their help.

    Args:
        name: One of ``COMMANDS``.

    Returns:
        The parser.
    """
    module = _module(name)
    help_of = {each.arg_name: each.description for each in parse(inspect.getdoc(module.run) or "").params}
    hints = inspect.get_annotations(module.run, eval_str=True)
    parser = CommandParser(prog=f"simo {name}", description=COMMANDS[name], allow_abbrev=False)
    for argument, number in module.POSITIONAL.items():
        kind = hints[argument] if number is None else hints[argument].__args__[0]
        parser.add_argument(argument, nargs=number, type=kind, help=help_of[argument])
    own = set(module.POSITIONAL)
    for argument, parameter in inspect.signature(module.run).parameters.items():
        if argument in own:
            continue
        common: dict[str, Any] = {"default": parameter.default, "help": help_of[argument]}
        if hints[argument] is bool:  # --scores, not --scores true
            parser.add_argument(f"--{argument}", action=ActionYesNo(no_prefix="no_"), **common)
        elif len(argument) == 1:
            parser.add_argument(f"-{argument}", f"--{argument}", type=hints[argument], **common)
        else:
            continue
        own.add(argument)
    parser.add_function_arguments(module.run, skip=own)
    return parser


def run_command(name: str, args: Sequence[str]) -> None:
    """Run a command.

    Args:
        name: One of ``COMMANDS``.
        args: Its arguments, as on the command line.

    Raises:
        SystemExit: With 1 if it failed, 2 after a wrong argument, 130 after Ctrl-C.
    """
    arguments = command_parser(name).parse_args(list(args))
    try:
        _module(name).run(**arguments.as_dict())
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        line = None if os.environ.get("SIMO_TRACEBACK") else missing_extra(str(error)) or user_error(error)
        if line is None:
            raise
        print(f"simo {name}: error: {line} (SIMO_TRACEBACK=1 prints the traceback)", file=sys.stderr)
        raise SystemExit(1) from None


def _module(name: str) -> Any:
    return import_module(f"simo_lightning.commands.{name}")
