"""The help of the command: the classes of this package by their names, and one line for a wrong argument."""

import difflib
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import DefaultHelpFormatter
from lightning.pytorch import LightningDataModule
from torch import nn

# Modules whose classes are the choices of an argument, by the last part of its name.
_HOMES = {
    "model": ("simo_lightning.module", "simo_lightning.probe"),
    "data": ("simo_lightning.data",),
    "encoder": ("simo_lightning.encoders",),
    "loss": ("simo_lightning.losses", "simo_lightning.semi_supervised"),
    "lr_scheduler": ("simo_lightning.schedules",),
}
_NOT_BY_COMMAND = r"(SemiSupervised)?(Tensor)?PairDataModule"  # to subclass, and to make of tensors
_FIRST = ("SimOModule", "ImageFolderPairDataModule", "SimOLoss")
_MOST_LISTED = 40  # known classes of another package; there are hundreds of torch.nn.Module


def own_classes(argument: str) -> dict[str, type]:
    """The classes of this package that are meant for an argument.

    Args:
        argument: Dotted name, such as "model.encoder".

    Returns:
        Classes by name, the usual one first, then in alphabetical order; empty for an argument without any.

    Example:
        >>> list(own_classes("model"))
        ['SimOModule', 'ProbeModule']
    """
    found = {}
    for home in _HOMES.get(argument.rpartition(".")[2], ()):
        module = import_module(home)
        for name in getattr(module, "__all__", None) or vars(module):
            value = getattr(module, name)
            is_own = inspect.isclass(value) and value.__module__.startswith(home) and not name.startswith("_")
            if is_own and not re.fullmatch(_NOT_BY_COMMAND, name) and _is_part(value):
                found[name] = value
    return {name: found[name] for name in sorted(found, key=lambda name: (name not in _FIRST, name))}


def _is_part(cls: type) -> bool:
    return issubclass(cls, nn.Module | LightningDataModule) or hasattr(cls, "step")  # a schedule has step


class ShortHelpFormatter(DefaultHelpFormatter):
    """jsonargparse's formatter, which lists this package's classes for an argument, not all of torch.nn."""

    def _expand_help(self, action: Any) -> str:
        text = re.sub(r"<class '([\w.]+)'>", r"\1", super()._expand_help(action))
        start, listed, paths = text.partition(", known subclasses: ")
        return f"{start}{_choices(action.dest, paths.rstrip(')').split(', '))})" if listed else text


def _choices(argument: str, paths: Sequence[str]) -> str:
    """The classes that an argument accepts, from the import paths of all that are known."""
    own = list(own_classes(argument))
    names = own or [path.rpartition(".")[2] for path in paths if len(paths) <= _MOST_LISTED]
    listed = [*names, *["any other by its import path" if names else "by import path"]]
    return f"; classes: {', '.join(listed)}"


def list_of_classes(argument: str) -> str:
    """The classes of this package for an argument, one a line with its summary.

    Args:
        argument: Dotted name, such as "data".

    Returns:
        Lines for the command to print.
    """
    classes = own_classes(argument)
    width = max(map(len, classes))
    lines = [f"  {name:<{width}}  {(cls.__doc__ or '').strip().splitlines()[0]}" for name, cls in classes.items()]
    return "\n".join(
        [
            f"Classes for --{argument}, by name; any other by its import path:",
            *lines,
            f"The arguments of one: --{argument}.help {next(iter(classes))}",
        ]
    )


def with_help_of_class(args: list[str]) -> tuple[str, list[str]]:
    """Arguments that show the help which ``--model.encoder.help ImageEncoder`` and the like ask for.

    jsonargparse knows the arguments of a model only once it knows its class. It is the one of ``--model`` or of the
    config; otherwise SimOModule.

    Args:
        args: Of the command line.

    Returns:
        A text to print first, such as a list of classes, and the arguments for the parser: none if the text is all,
        the same if they ask for no such help.

    Example:
        >>> with_help_of_class(["fit", "--model.encoder.help", "ImageEncoder"])
        ('', ['fit', '--model.help=SimOModule', '--model.encoder.help=ImageEncoder'])
    """
    asked = [index for index, word in enumerate(args) if re.match(r"--(model|data)(\.\w+)*\.help(=|$)", word)]
    if not asked or args[0].startswith("-"):
        return "", args
    index = asked[0]
    option, _, value = args[index].partition("=")
    if not value and index + 1 < len(args) and not args[index + 1].startswith("-"):
        value = args[index + 1]
    argument = option[2:].removesuffix(".help")
    part = argument.partition(".")[0]
    given = _class_of(args, part)
    text = ""
    if not value and not (argument == part and given):
        classes = list(own_classes(argument))
        text = list_of_classes(argument) if len(classes) > 1 else ""
        if text and argument != "model":
            return text, []
        value = classes[0] if classes else ""
    if argument == part:
        return text, [args[0], f"--{part}.help={value or given}"]
    given = given or ("SimOModule" if part == "model" else None)
    if given is None:
        return f"{option} needs the class of the data: --data CLASS {option}\n{list_of_classes(part)}", []
    return text, [args[0], f"--{part}.help={given}", f"{option}={value}" if value else option]


def _class_of(args: Sequence[str], part: str) -> str | None:
    """The class that the arguments, or else their config files, give for the model or the data."""
    given = None
    for index, word in enumerate(args):
        name, _, value = word.partition("=")
        value = value or (args[index + 1] if index + 1 < len(args) else "")
        if name in (f"--{part}", f"--{part}.class_path"):
            return value
        if name in ("--config", "-c"):
            given = _class_in_file(value, part) or given
    return given


def _class_in_file(path: str, part: str) -> str | None:
    try:
        config = yaml.safe_load(Path(path).expanduser().read_text())
        value = config.get(part)
    except (OSError, ValueError, AttributeError, yaml.YAMLError):  # reported when the config is parsed
        return None
    found = value.get("class_path") if isinstance(value, dict) else value
    return found if isinstance(found, str) else None


def explain(line: str) -> str:
    """A message of jsonargparse about an argument, in the words of the command line.

    Args:
        line: The message in one line.

    Returns:
        The line that names the option, what it must be, and the value; as it is if it is of another form.

    Example:
        >>> explain('Parser key "n": Expected a int. Got value: x')
        '--n must be int, got x'
    """
    keys, cls = [], ""
    while step := re.match(r"""Parser key "([\w.]+)": ?(?:Problem with given class_path '([\w.]+)': ?)?""", line):
        keys.append(step[1])
        cls, line = step[2] or "", line[step.end() :]
    if not keys:
        return line
    option = f"--{'.'.join(keys)}"
    forms: list[tuple[str, Callable[[Any], str]]] = [
        (r"Option '([\w.]+)' is not accepted", lambda found: _unknown_argument(option, cls, found[1])),
        (r"[Tt]he following arguments are required: (.+)", lambda found: _required(option, found[1])),
        (
            r"(?:Expected a path but .+?; )?Expected a dot import path string: ([^;]+)(?:; Given value: .*)?",
            lambda found: _unknown_class(option, found[1]),
        ),
        (
            r"Expected a ([^;]+?)(?:\. Got value|; Given value): (.+)",
            lambda found: f"{option} must be {_type_name(found[1])}, got {found[2]}",
        ),
    ]
    for pattern, text in forms:
        found = re.fullmatch(pattern, line)
        if found:
            return text(found)
    return f"{option}: {line}"


def _unknown_argument(option: str, cls: str, name: str) -> str:
    close = difflib.get_close_matches(name.partition(".")[0], _arguments(cls), n=1)
    hint = f", did you mean {option}.{close[0]}?" if close else ""
    return f"{option}.{name} is no argument of {cls.rpartition('.')[2]}{hint}"


def _required(option: str, names: str) -> str:
    options = [f"{option}.{name}" for name in re.split(r",\s*", names)]
    return f"{' and '.join(options)} must be given"


def _unknown_class(option: str, value: str) -> str:
    classes = list(own_classes(option[2:]))
    named = (
        f"a class ({', '.join(classes)}, or another by its import path)" if classes else "a class or its import path"
    )
    close = difflib.get_close_matches(value, classes, n=1)
    return f"{option} must be {named}, got {value}{f', did you mean {close[0]}?' if close else ''}"


def _type_name(name: str) -> str:
    """A type as it is written in an annotation, without the name of its module; the values of a Literal."""
    name = name.removeprefix("typing.")
    return f"one of {name[8:-1]}" if name.startswith("Literal[") else name


def _arguments(cls: str) -> list[str]:
    """Arguments of a class that is imported, and of its bases."""
    module, _, name = cls.rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    bases = inspect.getmro(found) if inspect.isclass(found) else ()
    return [name for base in bases if "__init__" in vars(base) for name in inspect.signature(base).parameters]
