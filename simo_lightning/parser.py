"""The parser of the command, and its one-line error messages."""

import linecache
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import SUPPRESS
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from simo_lightning.completion import SHELLS, PrintCompletion
from simo_lightning.extras import missing_extra
from simo_lightning.help import ShortHelpFormatter, explain, with_help_of_class


class SimoParser(LightningArgumentParser):
    """LightningArgumentParser with one-line errors, which accepts the config file of any other subcommand."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"formatter_class": ShortHelpFormatter, **kwargs})
        self._others: list[SimoParser] = []

    def share_options(self, others: "list[SimoParser]") -> None:
        """Ignore options in config files that only other subcommands have.

        Args:
            others: Parsers of the other subcommands.
        """
        self._others = others

    def add_subcommands(self, *args: Any, **kwargs: Any) -> Any:
        """Add subcommands, and keep the action so that further ones can be added."""
        self.commands = super().add_subcommands(*args, **kwargs)
        self.add_argument(
            "--print_completion",
            action=PrintCompletion,
            choices=SHELLS,
            default=SUPPRESS,
            dest=SUPPRESS,
            help="Print the script by which a shell completes arguments.",
        )
        return self.commands

    def parse_args(self, args: Any = None, *others: Any, **kwargs: Any) -> Any:
        """Parse; ``--model.encoder.help CLASS`` and the like are understood without the class of the model."""
        if hasattr(self, "commands"):  # not the parser of a class
            text, args = with_help_of_class(list(sys.argv[1:] if args is None else args))
            if text:
                print(text)
                if not args:
                    self.exit()
        elif args and len(args) == 1 and args[0].endswith("=None"):  # jsonargparse has read null, and writes None
            args = [args[0].removesuffix("None") + "null"]
        return super().parse_args(args, *others, **kwargs)

    def parse_string(self, *args: Any, **kwargs: Any) -> Any:
        """Parse a config without the options of other subcommands."""
        name = next((name for name in ("content", "cfg_str") if name in kwargs), None)
        content = kwargs.pop(name) if name is not None else args[0]
        return super().parse_string(self._own_options(content), *args[1:], **kwargs)

    def _own_options(self, content: str) -> str:
        """The config without options of other subcommands and without a null folder or checkpoint."""
        try:
            config = yaml.safe_load(content)
        except yaml.YAMLError:
            return content  # jsonargparse reports the error
        if not self._others or not isinstance(config, dict):
            return content
        known = set().union(*(other._option_names() for other in self._others)) - self._option_names()
        dropped = known | {name for name in ("ckpt_path", "run_dir") if config.get(name, "") is None}
        if not dropped & config.keys():
            return content
        kept: str = yaml.safe_dump({name: value for name, value in config.items() if name not in dropped})
        return kept

    def _option_names(self) -> set[str]:
        return {action.dest.split(".")[0] for action in self._actions}

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End the command.

        Args:
            message: Multi-line message of jsonargparse.
            ex: Exception that caused it.

        Raises:
            SystemExit: With status 2.
        """
        if not self.exit_on_error:
            super().error(message, ex)
        prog = self.prog.split()[0]
        line = missing_extra(message) or f"{explain(in_one_line(message))} ({prog} fit --help lists the options)"
        print(f"{prog}: error: {line}", file=sys.stderr)
        raise SystemExit(2)


# Lines of a jsonargparse message that describe its search through types, not the error.
_SEARCH = (
    "Does not validate",
    "Subtypes:",
    "Errors:",
    "Given value type:",
    "Given value: NestedArg",
    "Given value: Namespace",
    "Expected a <class 'NoneType'>",
)


def in_one_line(message: str) -> str:
    r"""The relevant part of a jsonargparse message.

    Args:
        message: Multi-line message.

    Returns:
        One line.

    Example:
        >>> in_one_line("Parser key 'n':\n  Errors:\n    - Expected a <class 'int'>\n  Given value: x")
        "Parser key 'n': Expected a int; Given value: x"
    """
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    kept = [re.sub(r"<class '([\w.]+)'>", r"\1", line) for line in lines if line and not line.startswith(_SEARCH)]
    return "; ".join(kept).replace(":; ", ": ")


_PACKAGE = Path(__file__).parent


def user_error(error: Exception) -> str | None:
    """One-line message of an error that the user's input caused; None for an error in code.

    Input is rejected by an explicit ``raise`` statement: of any exception in this package and Lightning, of ValueError
    in every other installed library. The state of the machine, such as a full disk, raises OSError. Every other error,
    and all that a user's own classes raise, is an error in code.

    Args:
        error: Raised by a command, perhaps in a worker of a data loader.

    Returns:
        The message, or None.
    """
    if isinstance(error, OSError | MisconfigurationException):
        return in_one_line(str(error))
    message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    path, statement = _raised_at(error)
    if "Original Traceback (most recent call last):" in message:  # from a data loader's worker, as text
        path, statement, message = _raised_in_worker(message)
    if not statement.startswith("raise ") or isinstance(error, AssertionError | NotImplementedError):
        return None
    installed = re.search(
        r"/(site|dist)-packages/(lightning|lightning_fabric|pytorch_lightning)?\b", Path(path).as_posix()
    )
    if _PACKAGE in Path(path).parents or (installed and (installed[2] or isinstance(error, ValueError))):
        return in_one_line(message)
    return None


def _raised_at(error: Exception) -> tuple[str, str]:
    """File and statement that raised it."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return "", ""
    path = traceback.tb_frame.f_code.co_filename
    return path, linecache.getline(path, traceback.tb_lineno).strip()


def _raised_in_worker(message: str) -> tuple[str, str, str]:
    """File and statement of the innermost frame of a formatted traceback, and the error message."""
    frames = list(re.finditer(r'^  File "(.+)", line \d+, in .+\n    (.*)$', message, re.MULTILINE))
    if not frames:
        return "", "", message
    messages = re.findall(r"^[\w.]+(?:Error|Exception): (.*)", message[frames[-1].end() :], re.MULTILINE | re.DOTALL)
    return frames[-1][1], frames[-1][2], messages[-1] if messages else message
