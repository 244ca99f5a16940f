"""The commands that read no config of a run: ``simo NAME ARGUMENTS``.

Each is a module with a function ``run``, whose arguments are those of the command, and ``POSITIONAL``, the names of the
arguments that have no ``--`` with their number in the form of argparse: None for one, "+" for one or more.
"""

from simo_lightning.commands.parser import COMMANDS, CommandParser, command_parser, run_command

__all__ = ["COMMANDS", "CommandParser", "command_parser", "run_command"]
