"""The command's parser, which tells a mistake in one line."""

import re
import sys
from typing import NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from simo_lightning.extras import missing_extra


class SimoParser(LightningArgumentParser):
    """Says what is wrong and where in one line, where jsonargparse prints its whole search."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End the command.

        Args:
            message: jsonargparse's, many lines.
            ex: What raised it.

        Raises:
            SystemExit: With 2.
        """
        if not self.exit_on_error:
            super().error(message, ex)
        prog = self.prog.split()[0]
        line = missing_extra(message) or f"{in_one_line(message)} ({prog} fit --help lists what there is)"
        print(f"{prog}: error: {line}", file=sys.stderr)
        raise SystemExit(2)


# Lines of a jsonargparse message that tell how it searched, not what is wrong.
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
    r"""The part of a jsonargparse message that a user needs.

    Args:
        message: Many lines.

    Returns:
        One line.

    Example:
        >>> in_one_line("Parser key 'n':\n  Errors:\n    - Expected a <class 'int'>\n  Given value: x")
        "Parser key 'n': Expected a int; Given value: x"
    """
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    kept = [re.sub(r"<class '([\w.]+)'>", r"\1", line) for line in lines if line and not line.startswith(_SEARCH)]
    return "; ".join(kept).replace(":; ", ": ")
