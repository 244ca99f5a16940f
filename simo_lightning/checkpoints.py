"""Checkpoints that bring their own arguments: ``load_from_checkpoint(path)`` and nothing else.

A module's arguments are pickled into its checkpoint beside the weights, each tensor that is also a weight by its name
only, so nothing is stored twice. Like every pickle, such a file runs code when it is opened: open only files you trust.
"""

import importlib
import inspect
import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

_KEY = "simo_module"


class NotStored:
    """Stands for an argument that could not be pickled; says so when it is used.

    Args:
        name: Of the argument.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Raise.

        Args:
            arguments: Ignored.
            named: Ignored.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"the checkpoint does not hold the argument {self.name!r} (it could not be pickled): "
            f"pass it, load_from_checkpoint(path, {self.name}=...)"
        )


class SelfContained:
    """Mixin, before LightningModule: remembers the arguments and puts them into every checkpoint.

    A subclass with arguments of its own needs nothing more: those of the outermost class are the ones remembered.
    """

    def __new__(cls, *arguments: Any, **named: Any) -> Self:  # noqa: D102
        module = super().__new__(cls)
        try:
            bound = inspect.signature(cls).bind(*arguments, **named)
        except TypeError:  # unpickling and deepcopy give none; __init__ tells anyone else what is missing
            return module
        given = dict(bound.arguments)
        for name, parameter in bound.signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                given |= given.pop(name, {})
        module.__dict__["_given"] = given
        return module

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Lightning's hook: add the arguments and the class.

        Args:
            checkpoint: What will be saved.
        """
        cls = type(self)
        weights = self.state_dict(keep_vars=True)  # type: ignore[attr-defined]
        given = {name: _pack(name, value, weights) for name, value in self.__dict__.get("_given", {}).items()}
        checkpoint[_KEY] = {"class": f"{cls.__module__}:{cls.__qualname__}", "arguments": given}

    @classmethod
    def load_from_checkpoint(
        cls, checkpoint_path: str | Path, map_location: Any = None, strict: bool = True, **arguments: Any
    ) -> Self:
        """Make the module of a checkpoint again, with its weights.

        Args:
            checkpoint_path: File.
            map_location: As in torch.load; None keeps each tensor's device where the machine has it, else the CPU.
            strict: Whether the names of the weights must match exactly.
            arguments: Replace arguments of the stored module.

        Returns:
            The module, on the device of its weights.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is cut short or no checkpoint of such a module.
        """
        checkpoint = read_checkpoint(checkpoint_path, map_location)
        stored = _stored(checkpoint, checkpoint_path)["arguments"]
        weights = checkpoint["state_dict"]
        given = {name: _unpack(name, value, weights) for name, value in stored.items() if name not in arguments}
        module = cls(**given, **arguments)
        module.on_load_checkpoint(checkpoint)  # type: ignore[attr-defined]
        module.load_state_dict(weights, strict=strict)  # type: ignore[attr-defined]
        return module


def read_checkpoint(path: str | Path, map_location: Any = None) -> dict[str, Any]:
    """Read a checkpoint file.

    Args:
        path: File.
        map_location: As in torch.load; None keeps each tensor's device where the machine has it, else the CPU.

    Returns:
        The checkpoint.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if map_location is None and not torch.accelerator.is_available():
        map_location = "cpu"
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"checkpoint {path} cannot be read: cut short, or not a checkpoint ({reason})") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"checkpoint {path} must hold a state_dict, as Lightning writes it, got none")
    return checkpoint


def load_module(path: str | Path, map_location: Any = None) -> Any:
    """Make the module of a checkpoint again, whatever its class.

    Args:
        path: File.
        map_location: As in torch.load.

    Returns:
        The module.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is cut short, or its class cannot be imported.
    """
    home, _, name = _stored(read_checkpoint(path, map_location), path)["class"].partition(":")
    try:
        found: Any = importlib.import_module(home)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"checkpoint {path} is of class {home}.{name}, which cannot be imported: {error}") from error
    return found.load_from_checkpoint(path, map_location=map_location)


def _stored(checkpoint: dict[str, Any], path: str | Path) -> dict[str, Any]:
    if _KEY not in checkpoint:
        raise ValueError(f"checkpoint {path} was not written by a module of simo_lightning: it has no {_KEY!r} entry")
    stored: dict[str, Any] = checkpoint[_KEY]
    return stored


class _Pickler(pickle.Pickler):
    """Pickles an argument with each tensor that is a weight replaced by that weight's name."""

    def __init__(self, buffer: io.BytesIO, weights: dict[str, Tensor]) -> None:
        super().__init__(buffer)
        self.names = {id(weight): name for name, weight in weights.items()}

    def persistent_id(self, value: Any) -> tuple[str, bool, bool] | None:
        if isinstance(value, Tensor) and id(value) in self.names:
            return self.names[id(value)], isinstance(value, nn.Parameter), value.requires_grad
        return None


class _Unpickler(pickle.Unpickler):
    def __init__(self, buffer: io.BytesIO, weights: dict[str, Tensor]) -> None:
        super().__init__(buffer)
        self.weights = weights

    def persistent_load(self, key: tuple[str, bool, bool]) -> Tensor:
        name, is_parameter, requires_grad = key
        weight = self.weights[name].clone()
        return nn.Parameter(weight, requires_grad) if is_parameter else weight


def _pack(name: str, value: Any, weights: dict[str, Tensor]) -> Tensor:
    """The pickled value as a uint8 tensor, which torch.load(weights_only=True) lets pass."""
    buffer = io.BytesIO()
    try:
        _Pickler(buffer, weights).dump(value)
    except (pickle.PicklingError, AttributeError, TypeError):  # a lambda, a local class, an open file
        buffer = io.BytesIO()
        pickle.dump(NotStored(name), buffer)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def _unpack(name: str, packed: Tensor, weights: dict[str, Tensor]) -> Any:
    try:
        return _Unpickler(io.BytesIO(packed.cpu().numpy().tobytes()), weights).load()
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"the argument {name!r} of the checkpoint cannot be made again ({error}): "
            f"import its code first, or pass load_from_checkpoint(path, {name}=...)"
        ) from error
