"""Completion of the command's arguments in a shell, by shtab (the extra ``completion``)."""

import argparse
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from pkgutil import resolve_name
from typing import Any, Literal, get_args, get_origin, get_type_hints

from jsonargparse import Namespace
from lightning.pytorch import Trainer
from torch.optim import SGD, AdamW, Optimizer
from typing_extensions import override

from simo_lightning.extras import import_extra
from simo_lightning.help import own_classes

SHELLS = ("bash", "zsh", "tcsh")
_FILES = r"config|ckpt_path|checkpoint|manifest|weights|unseen_classes|coarse|data\.path"  # ends of options
_FOLDERS = r"_dir"


class PrintCompletion(argparse.Action):
    """Action of an option that prints the script for a shell and ends the command."""

    @override
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        print(completion_script(parser.commands.choices, values))
        parser.exit()


def completion_script(commands: Mapping[str, argparse.ArgumentParser], shell: str) -> str:
    """The script that completes subcommands, options, classes of this package, choices and paths.

    Args:
        commands: Parsers of the subcommands by name.
        shell: That will read the script: ``"bash"``, ``"zsh"`` or ``"tcsh"``.

    Returns:
        The script. It runs without Python.

    Raises:
        ModuleNotFoundError: If shtab is missing.
    """
    shtab = import_extra("shtab")
    plain = argparse.ArgumentParser("simo")  # shtab would look through all of torch.nn in jsonargparse's parsers
    subcommands = plain.add_subparsers()
    for name, command in commands.items():
        target = subcommands.add_parser(name, add_help=False, help=(command.description or "").rstrip(":."))
        for option, choices in _options_of_command(command).items():
            action: Any = target.add_argument(option, choices=choices or None)
            if not choices and re.search(rf"({_FILES}|{_FOLDERS})$", option):
                action.complete = shtab.DIRECTORY if re.search(rf"{_FOLDERS}$", option) else shtab.FILE
    script: str = shtab.complete(plain, shell)
    return script


def _options_of_command(command: argparse.ArgumentParser) -> dict[str, list[str]]:
    """Options of a subcommand, each with its choices."""
    options: dict[str, list[str]] = {}
    for action in command._actions:
        options |= {option: list(map(str, action.choices or ())) for option in action.option_strings}
        if isinstance(action.default, Namespace) and "class_path" in action.default:  # a callback
            callback, cls = action.option_strings[0], resolve_name(action.default.class_path)
            options |= {callback: [cls.__name__, "null"], **dict(_options(callback, cls))}
    if "--model" in options:  # a command with a config
        options |= dict([*_options("--trainer", Trainer), *_classes("--model"), *_classes("--data")])
    return options


def _classes(option: str) -> Iterator[tuple[str, list[str]]]:
    """An option that takes a class, and the options of this package's classes for it."""
    classes = own_classes(option[2:]) or {cls.__name__: cls for cls in (AdamW, SGD)}
    yield option, list(classes)
    *outer, kind = option[2:].split(".")
    if kind in outer:  # a loss inside of a loss may hold one again
        return
    for cls in classes.values():
        yield from _options(option, cls)


def _options(option: str, cls: type) -> Iterator[tuple[str, list[str]]]:
    """The options that set the arguments of a class, each with its choices."""
    for name, annotation in _arguments(cls).items():
        types = [*get_args(annotation), annotation]
        if annotation is not str and (name == "optimizer" or own_classes(name)):
            yield from _classes(f"{option}.{name}")
            continue
        parts = [each for each in types if isinstance(each, type) and is_dataclass(each)]
        names = [each.__name__ for each in parts if len(parts) > 1]
        yield f"{option}.{name}", names + [value for each in types for value in _choices(each)]
        for each in parts:
            yield from _options(f"{option}.{name}", each)


def _arguments(cls: type) -> dict[str, Any]:
    """Annotations of a class's arguments, and of those that it passes on to its bases."""
    found: dict[str, Any] = {}
    for base in inspect.getmro(cls):
        if "__init__" in vars(base):
            init: Any = vars(base)["__init__"]
            hints, parameters = get_type_hints(init), list(inspect.signature(init).parameters.values())
            found = {each.name: hints.get(each.name) for each in parameters[1:]} | found
            if found.pop("kwargs", False) is False:  # none are passed on
                break
    return {name: hint for name, hint in found.items() if name != "params" and hint is not Optimizer}


def _choices(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    return ["true", "false"] if annotation is bool else []
