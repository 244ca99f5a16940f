"""Losses and miners of pytorch-metric-learning by name, with the numbers of classes and dimensions filled in."""

import inspect
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from simo_lightning.class_paths import InitArgumentsMixin, describe
from simo_lightning.extras import missing_extra
from simo_lightning.functional.moments import check_embeddings
from simo_lightning.losses.classifier import check_labels
from simo_lightning.losses.configure import NO_CLASSES, NO_DIMENSION, check_classes, check_dimension

LIBRARY = "pytorch_metric_learning"
# Arguments of the library that are parts with arguments of their own, and the module that holds their classes.
PARTS = {
    "distance": "distances",
    "embedding_regularizer": "regularizers",
    "loss": "losses",
    "losses": "losses",
    "miner": "miners",
    "miners": "miners",
    "reducer": "reducers",
    "weight_regularizer": "regularizers",
}
# Names of the library for the number of classes and for the dimension of the embeddings.
CLASSES, DIMENSIONS = ("num_classes",), ("embedding_size", "descriptors_dim")
# Losses of the library that take no labels, and base classes.
WITHOUT_LABELS = {"ManifoldLoss", "SelfSupervisedLoss", "VICRegLoss"}
BASES = {"BaseDistance", "BaseMetricLossFunction", "BaseLossWrapper", "BaseMiner", "BaseReducer", "BaseRegularizer"}
BASES |= {"EmbeddingRegularizerMixin", "GenericPairLoss", "WeightRegularizerMixin"}


class MetricLearningLoss(InitArgumentsMixin, nn.Module):
    """A loss of pytorch-metric-learning by the name of its class, with or without a miner.

    The number of classes and the dimension of the embeddings (``num_classes``, ``embedding_size``) are filled in from
    the data and the encoder where the loss requires them and they are not given. The loss and its miner see the global
    batch of all processes. Parameters of the loss, such as class vectors and proxies, are those of this module.

    Args:
        loss: Name of a class of ``pytorch_metric_learning.losses``, such as "ArcFaceLoss".
        arguments: Arguments of that class. A distance, reducer, regularizer, and the loss and miner inside of a wrapper
            such as CrossBatchMemory, are given as a name, or as ``{name: arguments}``: ``{"distance": {"LpDistance":
            {"p": 1}}}``. A number of classes that is optional, as in MarginLoss, is filled in if it is given as None.
            None: the defaults.
        miner: Name of a class of ``pytorch_metric_learning.miners``; it chooses the pairs or triplets of each batch.
            None: all of them.
        miner_arguments: Arguments of the miner, in the same form.

    Attributes:
        loss: The loss of pytorch-metric-learning; None until the numbers that it requires are known.
        miner: The miner, or None.

    Raises:
        ImportError: If pytorch-metric-learning is not installed.
        ValueError: If there is no such class or argument, an argument is missing, or the class refuses its arguments.

    Example:
        >>> loss = MetricLearningLoss("ArcFaceLoss", {"margin": 20})
        >>> loss.configure(num_classes=3, embedding_dim=8)
        >>> loss.loss.W.shape
        torch.Size([8, 3])

    Source:
        https://github.com/KevinMusgrave/pytorch-metric-learning.
    """

    loss: nn.Module | None
    memory_position: Tensor

    def __init__(
        self,
        loss: str,
        arguments: dict[str, Any] | None = None,
        miner: str | None = None,
        miner_arguments: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if miner is None and miner_arguments:
            raise ValueError(f"miner must be given with miner_arguments, got None and {miner_arguments}")
        self.name = _short_name("losses", loss)
        if self.name in WITHOUT_LABELS:
            raise ValueError(f"loss must be one that takes labels, got {self.name!r}")
        self.arguments = {name: _plain(value) for name, value in (arguments or {}).items()}
        self._store("arguments", arguments)
        self._store("miner_arguments", miner_arguments)
        self.num_classes: int | None = None
        self.loss = None
        self.miner = None if miner is None else _Maker(None, None).part("miners", {miner: miner_arguments or {}})
        try:
            self._make(None, None)
        except _OpenError as error:
            self._open = str(error)
            with torch.random.fork_rng(devices=[]):
                _Maker(1, 1).part("losses", {self.name: self.arguments})  # raises now where the arguments are wrong

    def _store(self, name: str, arguments: dict[str, Any] | None) -> None:
        """Keep the form of `arguments` that a checkpoint can hold."""
        stored = self.__dict__.get("_init_arguments", {})
        if name in stored:
            stored[name] = describe(_plain(arguments))

    def configure(self, num_classes: int | None, embedding_dim: int | None) -> None:
        """Make the loss if it has not been made.

        Args:
            num_classes: Number of classes of training.
            embedding_dim: Dimension of the embeddings.

        Raises:
            ValueError: If a number is neither given nor passed, or contradicts what was given.
        """
        for name, known in _counts(num_classes, embedding_dim).items():
            given = self.arguments.get(name)
            if given is not None and name in CLASSES:
                check_classes(self.name, given, known)
            elif given is not None:
                check_dimension(self.name, name, given, known)
        if self.loss is None:
            self._make(num_classes, embedding_dim)
        elif self.num_classes is not None:
            check_classes(self.name, self.num_classes, num_classes)

    def _make(self, num_classes: int | None, embedding_dim: int | None) -> None:
        maker = _Maker(num_classes, embedding_dim)
        made: nn.Module = maker.part("losses", {self.name: self.arguments})
        self.loss, self.num_classes = made, min(maker.num_classes, default=None)
        for part in made.modules():
            if type(part).__name__ == "DynamicSoftMarginLoss":  # whose running state a checkpoint must hold
                part.register_buffer("hist_", part.__dict__.pop("hist_"))
        if any(self._memories()):
            self.register_buffer("memory_position", self._positions())

    def _memories(self) -> Iterator[Any]:
        """Parts that remember embeddings of former batches. They keep their position as plain numbers."""
        return (part for part in self.modules() if type(part).__name__ == "CrossBatchMemory")

    def _positions(self) -> Tensor:
        """Next row, and whether the memory is full, of each memory ``(M, 2)``."""
        return torch.tensor([[memory.queue_idx, int(memory.has_been_filled)] for memory in self._memories()])

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        positions = self._buffers.get("memory_position")
        for memory, (row, full) in zip(self._memories(), [] if positions is None else positions.tolist(), strict=False):
            memory.queue_idx, memory.has_been_filled = row % memory.memory_size, bool(full)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            embeddings: Float tensor ``(N, D)``.
            labels: Integers ``(N,)``; in ``0..C - 1`` if the loss requires the number C of classes.

        Returns:
            Scalar.

        Raises:
            ValueError: If a type, shape, device or label is wrong, the loss does not exist yet, or it takes no miner.
        """
        check_embeddings(embeddings, labels)
        if self.loss is None:
            raise ValueError(self._open)
        if self.num_classes is not None:
            check_labels(self.name, labels, self.num_classes)
        for memory in self._memories():
            if len(labels) > memory.memory_size:
                raise ValueError(
                    f"memory_size must be at least the size of the global batch, {len(labels)}, "
                    f"got {memory.memory_size}"
                )
        if self.miner is None:
            value: Tensor = self.loss(embeddings, labels)
        else:
            value = self._mined(self.miner, embeddings, labels)
        if "memory_position" in self._buffers:
            self.memory_position.copy_(self._positions())
        return value

    def _mined(self, miner: nn.Module, embeddings: Tensor, labels: Tensor) -> Tensor:
        assert self.loss is not None
        try:
            value: Tensor = self.loss(embeddings, labels, miner(embeddings, labels))
        except ValueError as error:
            if "indices_tuple" in str(error):
                raise ValueError(f"miner must be None for {self.name}, got {type(miner).__name__}") from error
            raise
        return value

    def extra_repr(self) -> str:
        """The name, for printing the module."""
        return f"{self.name!r}, {self.arguments}"


def _counts(num_classes: int | None, dimension: int | None) -> dict[str, int | None]:
    """The two numbers by all names that the library has for them."""
    return {**dict.fromkeys(CLASSES, num_classes), **dict.fromkeys(DIMENSIONS, dimension)}


def _classes(kind: str) -> dict[str, type[nn.Module]]:
    """Classes of one module of the library that can be made, by name."""
    try:
        module = import_module(f"{LIBRARY}.{kind}")
    except ModuleNotFoundError as error:
        raise ImportError(missing_extra(f"No module named '{error.name}'") or str(error)) from error
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, nn.Module) and name not in BASES
    }


def _short_name(kind: str, name: Any) -> str:
    """The name of a class of the library without the library. Nothing else is ever looked up."""
    known = _classes(kind)
    short = name.removeprefix(f"{LIBRARY}.{kind}.") if isinstance(name, str) else name
    if not isinstance(short, str) or short not in known:
        near = get_close_matches(str(short), known, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"{str(name)[:100]!r} is no class of {LIBRARY}.{kind}{hint}")
    return short


def _parameters(cls: type) -> tuple[set[str], set[str]]:
    """Names of all arguments of a class of the library, and of those without a default.

    The library passes ``**kwargs`` on to the base classes, and ``*args`` where a base class requires arguments.
    """
    names: set[str] = set()
    required: set[str] = set()
    passed_on = True
    for base in cls.__mro__:
        if "__init__" not in vars(base) or not base.__module__.startswith(LIBRARY):
            continue
        found = list(inspect.signature(base.__init__).parameters.values())[1:]  # type: ignore[misc]
        named = [each for each in found if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
        names |= {each.name for each in named}
        if passed_on:
            required |= {each.name for each in named if each.default is each.empty}
            passed_on = any(each.kind is each.VAR_POSITIONAL for each in found)
    return names, required


class _OpenError(ValueError):
    """A number is neither given nor known yet."""


class _Maker:
    """Makes parts of the library from names and arguments.

    Args:
        num_classes: Filled in where it is required and not given; None if unknown.
        dimension: Of the embeddings, likewise.

    Attributes:
        num_classes: Those that the losses made so far have.
    """

    def __init__(self, num_classes: int | None, dimension: int | None) -> None:
        self.counts = _counts(num_classes, dimension)
        self.num_classes: list[int] = []

    def part(self, kind: str, value: Any) -> Any:
        """A loss, miner, distance, reducer or regularizer.

        Args:
            kind: Module of the library.
            value: A name, ``{name: arguments}``, a list of these, or an object or None, which is returned.

        Returns:
            The object, or a list.

        Raises:
            ValueError: If it cannot be made.
        """
        if value is None or isinstance(value, nn.Module):
            return value
        if isinstance(value, list | tuple):
            return [self.part(kind, each) for each in value]
        name, given = _name_and_arguments(kind, value)
        cls = _classes(kind)[_short_name(kind, name)]
        arguments = self._filled(cls, given)
        for each in PARTS.keys() & arguments.keys():
            arguments[each] = self.part(PARTS[each], arguments[each])
        try:
            made = cls(**arguments)
        except Exception as error:  # the library raises AssertionError, TypeError, Exception and others
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"{cls.__name__} cannot be made with arguments {given}: {reason}") from error
        self.num_classes += [arguments[name] for name in CLASSES if arguments.get(name) is not None]
        return made

    def _filled(self, cls: type, given: Mapping[str, Any]) -> dict[str, Any]:
        """The given arguments, with the numbers that are required, or given as None, filled in."""
        names, required = _parameters(cls)
        _check_names(cls, given, names)
        missing = sorted(required - given.keys() - self.counts.keys())
        if missing:
            raise ValueError(f"arguments of {cls.__name__} must hold {' and '.join(missing)}, got {sorted(given)}")
        arguments = dict(given)
        for name, known in self.counts.items():
            if arguments.get(name) is not None or name not in required | arguments.keys():
                continue
            if known is None:
                source = NO_CLASSES if name in CLASSES else NO_DIMENSION
                raise _OpenError(f"{name} of {cls.__name__} must be given, since {source}")
            arguments[name] = known
        return arguments


def _plain(value: Any) -> Any:
    """Arguments with every ``{"class_path": path, "init_args": arguments}`` as ``{path: arguments}``."""
    if isinstance(value, Mapping) and "class_path" in value:
        return {str(value["class_path"]): _plain(value.get("init_args") or {})}
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def _name_and_arguments(kind: str, value: Any) -> tuple[Any, dict[str, Any]]:
    if isinstance(value, str):
        return value, {}
    value = _plain(value)
    names, arguments = (
        (list(each) for each in (value.keys(), value.values())) if isinstance(value, Mapping) else ([], [])
    )
    if len(names) != 1 or not isinstance(arguments[0] or {}, Mapping):
        raise ValueError(f"a class of {LIBRARY}.{kind} must be a name or {{name: arguments}}, got {value!r}")
    return names[0], dict(arguments[0] or {})


def _check_names(cls: type, arguments: Mapping[str, Any], names: set[str]) -> None:
    for name in arguments:
        if name not in names:
            near = get_close_matches(str(name), names, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(sorted(names))}"
            raise ValueError(f"{cls.__name__} has no argument {str(name)[:100]!r}; {hint}")
