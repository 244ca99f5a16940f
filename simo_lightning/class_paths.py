"""Objects as plain data, ``{"class_path": ..., "init_args": {...}}`` as in a config, and back.

A description may be of unknown origin: only classes of ``PACKAGES``, or that the caller names, are built from it.
"""

import dataclasses
import importlib
import inspect
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import Self

# nn.Modules, optimizers and learning-rate schedulers of these packages are built from a file.
# Of timm only parts whose classes open no file: those of timm.task load weights by path or from the network.
PACKAGES = (
    "simo_lightning",
    "torch.nn",
    "torch.optim",
    "torchvision",
    "timm.layers",
    "timm.loss",
    "timm.models",
    "timm.optim",
    "pytorch_metric_learning",
)
MAX_VALUES = 10_000  # in one description; a config has tens
_BUILT = (nn.Module, Optimizer, LRScheduler)

Trusted = str | type
_RESERVED = {"class_path", "type_path", "not_stored"}  # keys of a dictionary that describes an object


_WEIGHTS_FOLLOW = ContextVar("weights_follow", default=False)


@contextmanager
def weights_follow() -> Iterator[None]:
    """Context in which modules are built whose weights are loaded from a checkpoint afterwards."""
    token = _WEIGHTS_FOLLOW.set(True)
    try:
        yield
    finally:
        _WEIGHTS_FOLLOW.reset(token)


def weights_are_read() -> bool:
    """Whether a module that is being built reads its trained weights; not if those of a checkpoint follow."""
    return not _WEIGHTS_FOLLOW.get()


class NotStoredError(ValueError):
    """An argument that is needed is not stored in a checkpoint."""


class InitArgumentsMixin:
    """Remembers, as plain data, the arguments an object was made with. Goes before ``nn.Module`` in the bases.

    A checkpoint then stores the object by its class path and arguments. A subclass needs nothing more: the arguments of
    the outermost class are remembered.

    Example:
        >>> class Scale(InitArgumentsMixin, nn.Module):
        ...     def __init__(self, factor: float = 1.0) -> None:
        ...         super().__init__()
        ...         self.factor = factor
        >>> describe(Scale(factor=2.0))["init_args"]
        {'factor': 2.0}
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:  # noqa: D102
        instance = super().__new__(cls)
        try:
            bound = inspect.signature(cls.__init__).bind(instance, *args, **kwargs)
        except TypeError:  # copying and unpickling pass no arguments; __init__ reports what is missing to anyone else
            return instance
        first, *parameters = bound.signature.parameters.values()  # first: self
        given = {name: value for name, value in bound.arguments.items() if name != first.name}
        for parameter in parameters:
            if parameter.kind is inspect.Parameter.VAR_POSITIONAL and given.pop(parameter.name, ()):
                return instance  # *args have no names to store them by
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                given |= given.pop(parameter.name, {})
        instance.__dict__["_init_arguments"] = {name: describe(value) for name, value in given.items()}
        return instance


def class_path(cls: type) -> str:
    """The shortest import path of a class `cls`: ``torch.optim.AdamW``, which is defined in ``torch.optim.adamw``."""
    parts = cls.__module__.split(".")
    for end in range(1, len(parts)):
        package = ".".join(parts[:end])
        if getattr(sys.modules.get(package), cls.__qualname__, None) is cls:
            return f"{package}.{cls.__qualname__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def describe(value: Any) -> Any:
    """A value as plain data.

    Args:
        value: Numbers, strings, None, tensors, dtypes and devices are themselves; lists, tuples and dictionaries are
            described element by element. Objects that remember their arguments (:class:`InitArgumentsMixin`),
            dataclasses, paths, and optimizer and scheduler classes or a ``partial`` of one become ``{"class_path",
            "init_args"}``; module classes, or a ``partial`` of one, ``{"type_path", "init_args"}``.

    Returns:
        Plain data; ``{"not_stored": class path}`` for anything else.
    """
    if value is None or type(value) in (bool, int, float, complex, str, torch.dtype, torch.device, torch.Size):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) in (list, tuple):
        return type(value)(describe(each) for each in value)
    if isinstance(value, dict) and not _RESERVED & value.keys() and all(isinstance(name, str) for name in value):
        return {name: describe(each) for name, each in value.items()}
    if isinstance(value, Path):
        return {"class_path": "pathlib.Path", "init_args": {"path": str(value)}}
    cls, keywords = (value.func, value.keywords) if isinstance(value, partial) and not value.args else (value, {})
    if isinstance(cls, type) and issubclass(cls, _BUILT) and "<" not in cls.__qualname__:
        key = "class_path" if _makes_optimizer(cls) else "type_path"
        return {key: class_path(cls)} | ({"init_args": describe(keywords)} if keywords else {})
    cls, arguments = type(value), getattr(value, "__dict__", {}).get("_init_arguments")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value) if field.init]
        arguments = {name: describe(getattr(value, name)) for name in fields}
    if arguments is not None and "<" not in cls.__qualname__:  # a class inside a function cannot be imported
        return {"class_path": class_path(cls), "init_args": arguments}
    return {"not_stored": f"{cls.__module__}.{cls.__qualname__}", "function": _is_function(value)}


def is_plain(description: Any) -> bool:
    """Whether everything in a `description` is stored."""
    if isinstance(description, dict):
        return "not_stored" not in description and all(is_plain(each) for each in description.values())
    return all(is_plain(each) for each in description) if isinstance(description, list | tuple) else True


def build(description: Any, trusted: Iterable[Trusted] | Trusted = (), name: str = "argument") -> Any:
    """The value that was described.

    Args:
        description: From :func:`describe` or a config; of unknown origin.
        trusted: Classes, or import paths of classes, modules or packages, that are built beside those of ``PACKAGES``.
        name: Of the argument, for error messages.

    Returns:
        The value; an optimizer or scheduler as its class, or a ``partial`` of it. A function that was not stored is
        replaced by one that raises NotStoredError when it is called.

    Raises:
        NotStoredError: If something in it was not stored; a ValueError.
        ValueError: If something in it is of a class that is not trusted.
    """
    trusted = [trusted] if isinstance(trusted, Trusted) else list(trusted)
    return _build(description, trusted, name, iter(range(MAX_VALUES)))


def _build(description: Any, trusted: Sequence[Trusted], name: str, remaining: Iterator[int]) -> Any:
    if next(remaining, None) is None:
        raise ValueError(f"the argument {name!r} must hold at most {MAX_VALUES} values, got more")
    if type(description) in (list, tuple):
        return type(description)(_build(each, trusted, name, remaining) for each in description)
    if not isinstance(description, dict):
        return description
    if "not_stored" in description:
        placeholder = _NotStored(name, str(description["not_stored"]))
        return placeholder if description.get("function") else placeholder()
    if not _RESERVED & description.keys():
        return {key: _build(each, trusted, name, remaining) for key, each in description.items()}
    path = description.get("class_path", description.get("type_path"))
    arguments = {**(description.get("init_args") or {}), **(description.get("dict_kwargs") or {})}
    if path == "pathlib.Path":
        return Path(arguments["path"])
    cls = import_class(path, trusted)
    refuse_paths(cls, arguments)
    arguments = {str(key): _build(each, trusted, name, remaining) for key, each in arguments.items()}
    if "type_path" in description or _makes_optimizer(cls):
        return partial(cls, **arguments) if arguments else cls
    return cls(**arguments)


def refuse_paths(cls: type, arguments: dict[str, Any]) -> None:
    """Refuse a description that sets an argument by which the class opens a file.

    Args:
        cls: Lists such arguments in ``path_arguments``.
        arguments: From a description.

    Raises:
        ValueError: If one of them is set.
    """
    for name in getattr(cls, "path_arguments", ()):
        if arguments.get(name) is not None:
            raise ValueError(f"{name} of {class_path(cls)} is never taken from a file, got {arguments[name]!r}")


def import_class(path: Any, trusted: Sequence[Trusted] = ()) -> type:
    """The class of an import path, if it may be built.

    Args:
        path: Such as ``"torch.nn.Linear"``; of unknown origin.
        trusted: As for :func:`build`.

    Returns:
        A class that `trusted` names; or an nn.Module (other than an fx.GraphModule, which compiles code), optimizer or
        scheduler that is defined in one of ``PACKAGES``, or a dataclass of simo_lightning.

    Raises:
        ValueError: For anything else. Only modules of ``PACKAGES`` and `trusted` are imported.
    """
    refusal = f"{str(path)[:200]!r} is no class that is built from a file: {', '.join(PACKAGES)}, or trusted=[...]"
    if not isinstance(path, str) or not all(part.isidentifier() for part in path.split(".")):
        raise ValueError(refusal)
    for each in trusted:
        if isinstance(each, type) and path in (class_path(each), f"{each.__module__}.{each.__qualname__}"):
            return each
    names = [each for each in trusted if isinstance(each, str)]
    if not _within(path, names) and (not _within(path, PACKAGES) or any(part[0] == "_" for part in path.split("."))):
        raise ValueError(refusal)
    try:
        found = _import(path)
    except Exception as error:  # a module may fail by any when it is imported
        raise ValueError(f"class {path} cannot be imported: {error}") from error
    if not isinstance(found, type):
        raise ValueError(refusal)
    if path in names:
        return found
    is_own_dataclass = dataclasses.is_dataclass(found) and _within(found.__module__, PACKAGES[:1])
    known = (issubclass(found, _BUILT) or is_own_dataclass) and not issubclass(found, torch.fx.GraphModule)
    if not known or not _within(found.__module__, (*PACKAGES, *names)):
        raise ValueError(refusal)
    return found


def _import(path: str) -> Any:
    package, *parts = path.split(".")
    found: Any = importlib.import_module(package)
    for part in parts:
        if isinstance(found, ModuleType) and not hasattr(found, part):
            importlib.import_module(f"{found.__name__}.{part}")
        found = getattr(found, part)
        if isinstance(found, ModuleType) and not _within(found.__name__, [package]):
            raise AttributeError(f"{found.__name__} is not part of {package}")
    return found


def _within(path: str, packages: Iterable[str]) -> bool:
    return any(path == package or path.startswith(f"{package}.") for package in packages)


def _makes_optimizer(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Optimizer | LRScheduler)


def _is_function(value: Any) -> bool:
    return callable(value) and not isinstance(value, nn.Module)


class _NotStored:
    """Placeholder for an argument that a checkpoint does not hold; raises when it is called."""

    def __init__(self, name: str, type_name: str) -> None:
        self.name, self.type_name = name, type_name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotStoredError(
            f"the checkpoint does not hold the argument {self.name!r} (a {self.type_name} made in Python): "
            f"pass it, load_from_checkpoint(path, {self.name}=...)"
        )
