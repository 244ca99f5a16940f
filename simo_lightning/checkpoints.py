"""Checkpoints that hold plain data and tensors: opening one runs no code from it.

``load_from_checkpoint(path)`` needs nothing else where the module's arguments can be described as in a config: numbers,
strings, optimizers, schedulers, and modules that remember their arguments
(:class:`~simo_lightning.class_paths.InitArgumentsMixin`) or were made by the command line. The ``preprocessing`` of a
module is among them, whether it was passed or computed from the training images.
"""

import json
import pickle
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from lightning.pytorch.core.saving import load_hparams_from_tags_csv
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typing_extensions import Self

from simo_lightning.class_paths import (
    InitArgumentsMixin,
    NotStoredError,
    Trusted,
    build,
    class_path,
    describe,
    import_class,
    is_plain,
    refuse_paths,
    weights_follow,
)
from simo_lightning.extras import import_extra
from simo_lightning.lightning_private import given_arguments
from simo_lightning.preprocessing import Preprocessing, takes_preprocessing
from simo_lightning.tensor_files import (
    SHARDED_REST,
    File,
    check_archive,
    check_sizes,
    first_line,
    is_sharded,
    read_sharded,
    read_tensors,
    reason_of,
)

_KEY = "simo_module"
# The files of a folder that ``SimOModule.save_pretrained`` writes, and the name of the class means among the weights,
# which no parameter can have, since ``classes`` is an attribute of the module.
CONFIG_FILE, WEIGHTS_FILE, CLASS_MEANS = "config.json", "model.safetensors", "classes.means"
FOLDER_FORMAT = 1  # of config.json; a reader refuses a later one
_LARGEST_CONFIG = 2**26  # bytes
_EXTRA_BYTES = 2**28  # that building a module may take beyond its weights, such as for a classifier that is removed


class CheckpointMixin(InitArgumentsMixin):
    """Stores the class path and the arguments of a LightningModule in its checkpoints. Goes before LightningModule.

    A subclass with arguments of its own needs nothing more. An argument that is neither plain data nor has a
    description is not stored, and must be passed again to :meth:`load_from_checkpoint`. If the module has an attribute
    ``preprocessing``, its value when the checkpoint is written is stored among the arguments, and set again where the
    checkpoint is loaded or resumed from.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:  # noqa: D102
        module = super().__new__(cls, *args, **kwargs)
        # the command line knows class path and arguments of objects that do not remember them
        given = given_arguments()
        stored = module.__dict__.get("_init_arguments", {})
        if stored.keys() <= given.keys() and given.get("_class_path", cls.__name__).endswith(cls.__name__):
            for name, value in stored.items():
                if not is_plain(value) and isinstance(given[name], dict):
                    stored[name] = given[name]
        return module

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the class path and arguments to the `checkpoint`, and convert its other entries to plain data."""
        arguments = dict(self.__dict__.get("_init_arguments", {}))
        preprocessing = known_preprocessing(self)  # type: ignore[arg-type]
        if preprocessing is not None:
            arguments["preprocessing"] = describe(preprocessing)
        for key in ("hyper_parameters", "datamodule_hyper_parameters"):  # of save_hyperparameters(), with any object
            if key in checkpoint:
                checkpoint[key] = _plain_arguments(checkpoint[key])
        for key, value in checkpoint.items():
            checkpoint[key] = value if key == "state_dict" else _plain(value, key)
        checkpoint[_KEY] = {"class_path": class_path(type(self)), "init_args": arguments}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the preprocessing of a `checkpoint`.

        Raises ValueError if its weights do not fit, a fit cannot be resumed from it, or another preprocessing was
        passed to this module.
        """
        trainer: Any = getattr(self, "_trainer", None)
        if trainer is None:  # load_from_checkpoint, which knows the path
            return
        path = trainer.ckpt_path
        weights = checkpoint.get("state_dict")  # None: a strategy that shards weights has loaded them already
        if weights is not None:
            check_weights(self, weights, path, strict=False)  # type: ignore[arg-type]
        if trainer.state.fn == "fit" and weights is not None and "optimizer_states" not in checkpoint:
            raise ValueError(
                f"checkpoint {path} holds weights alone (save_weights_only), so a fit cannot be resumed from it: "
                f"start a new one from its weights, {type(self).__name__}.load_from_checkpoint(path)"
            )
        if takes_preprocessing(self):
            _take_preprocessing(self, _preprocessing(_init_args(checkpoint), path), path)

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: File,
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        trusted: Iterable[Trusted] | Trusted = (),
        **kwargs: Any,
    ) -> Self:
        """Build the module of a checkpoint, with its weights. Runs no code from the file.

        Args:
            checkpoint_path: File.
            map_location: As in ``torch.load``; None keeps each tensor's device where the machine has it, else the CPU.
            hparams_file: YAML or CSV file with arguments by name, which replace those in the checkpoint.
            strict: Whether the names of the weights must match exactly; None: the module's ``strict_loading``.
            weights_only: False opens a file with arbitrary objects, which **runs the code it holds**; None is True.
            trusted: Classes, or import paths of classes, modules or packages, that may be built in addition to those of
                simo_lightning, torch, torchvision, timm and pytorch_metric_learning.
            kwargs: Arguments of the module, which replace those in the checkpoint.

        Returns:
            The module, on the device of its weights.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged, holds more than plain data, is not of such a module, or names a class
                that is not trusted; if an argument is not stored and not passed; if the weights do not fit.
        """
        checkpoint = read_checkpoint(checkpoint_path, map_location, weights_only)
        stored = {**_stored(checkpoint, checkpoint_path)["init_args"], **_from_hparams_file(cls, hparams_file)}
        weights = checkpoint["state_dict"]
        stored = {name: value for name, value in stored.items() if name not in kwargs}
        preprocessing = _preprocessing(stored, checkpoint_path)
        stored.pop("preprocessing", None)
        with MemoryLimit(weights), weights_follow():
            refuse_paths(cls, stored)
            arguments = {name: _argument(name, value, trusted, checkpoint_path) for name, value in stored.items()}
            with _error_in_one_line(f"checkpoint {checkpoint_path} does not fit {cls.__name__}"):
                module: Any = cls(**arguments, **kwargs)
        if preprocessing is not None:  # set afterwards, as a subclass may have no such argument
            module.preprocessing = preprocessing
        if is_overridden("configure_model", module):
            module.configure_model()
        with _error_in_one_line(f"checkpoint {checkpoint_path} does not fit {cls.__name__}"):
            module.on_load_checkpoint(checkpoint)
        strict = module.strict_loading if strict is None else strict
        check_weights(module, weights, checkpoint_path, strict)
        module.load_state_dict(weights, strict=strict)
        return module.to(_device(weights))


class TrainingClasses(NamedTuple):
    """The classes that a model was trained on.

    Attributes:
        names: C names.
        means: Mean of the embeddings of each class at length 1, float32 ``(C, D)``; nan for a class without training
            images. None: not known for these weights.
    """

    names: list[str]
    means: Tensor | None = None


def read_checkpoint(
    path: File, map_location: Any = None, weights_only: bool | None = None, mmap: bool | None = None
) -> dict[str, Any]:
    """Read a checkpoint file, the folder of a sharded checkpoint, or one of :meth:`SimOModule.save_pretrained`.

    Args:
        path: File or folder.
        map_location: As in ``torch.load``; None keeps each tensor's device where the machine has it, else the CPU. For
            a folder a device.
        weights_only: None or True: the file may hold tensors, numbers, strings, lists and dictionaries, and runs no
            code. False: it may hold any object, and **runs the code it holds**.
        mmap: As in ``torch.load``: True maps the file into memory, so that only what is used is read.

    Returns:
        The checkpoint; of a folder the entries ``state_dict`` and ``simo_module``.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: For a folder, if safetensors is not installed.
        ValueError: If it cannot be read, or holds something else; the message says which class.
    """
    if isinstance(path, str | Path) and Path(path, CONFIG_FILE).is_file():
        return _read_folder(Path(path), map_location)
    if is_sharded(path):
        return _read_sharded(path, map_location, weights_only)
    if isinstance(path, str | Path) and not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if map_location is None and not torch.accelerator.is_available():
        map_location = "cpu"
    safe = weights_only is None or weights_only
    try:
        size = check_archive(path) if safe else 0
        checkpoint = torch.load(path, map_location=map_location, weights_only=safe, mmap=mmap)
        if safe:
            check_sizes(checkpoint, size)
    except Exception as error:  # a damaged file fails anywhere
        raise ValueError(f"checkpoint {path} cannot be read: {reason_of(path, error)}") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise ValueError(f"checkpoint {path} must hold a state_dict, as Lightning writes it, got none")
    return checkpoint


def _read_sharded(folder: Any, map_location: Any, weights_only: bool | None) -> dict[str, Any]:
    """A folder of shards in the form of a checkpoint."""
    if weights_only is False:
        raise ValueError(f"weights_only must not be False for the folder {folder}, which is never opened unchecked")
    checkpoint = read_sharded(folder)
    if map_location is not None:
        if not isinstance(map_location, str | torch.device):
            raise ValueError(f"map_location must be a device for the folder {folder}, got {map_location!r}")
        checkpoint["state_dict"] = {name: value.to(map_location) for name, value in checkpoint["state_dict"].items()}
    return checkpoint


def _read_folder(folder: Path, map_location: Any) -> dict[str, Any]:
    """A folder of ``save_pretrained`` in the form of a checkpoint; as little checked as a checkpoint is."""
    config = _read_config(folder / CONFIG_FILE)
    import_extra("safetensors")
    weights = dict(read_tensors(folder / WEIGHTS_FILE))
    if map_location is not None:
        if not isinstance(map_location, str | torch.device):
            raise ValueError(f"map_location must be a device for the folder {folder}, got {map_location!r}")
        weights = {name: value.to(map_location) for name, value in weights.items()}
    arguments, means = dict(config["init_args"]), weights.pop(CLASS_MEANS, None)
    if config.get("preprocessing") is not None:
        arguments["preprocessing"] = {"class_path": class_path(Preprocessing), "init_args": config["preprocessing"]}
    stored = {"class_path": config.get("class_path"), "init_args": arguments, "loss_sizes": config.get("loss_sizes")}
    if config.get("classes") is not None or means is not None:
        stored["classes"] = {"names": config.get("classes"), "means": means}
    return {"state_dict": weights, "global_step": 0, _KEY: stored}  # the number of steps is not stored


def _read_config(path: Path) -> dict[str, Any]:
    """A config.json of unknown origin."""
    try:
        size = path.stat().st_size
        if size > _LARGEST_CONFIG:
            raise ValueError(f"it must have at most {_LARGEST_CONFIG:,} bytes, got {size:,}")
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict) or "format" not in config:
            raise ValueError("SimOModule.save_pretrained did not write it")
        if config["format"] != FOLDER_FORMAT:
            raise ValueError(
                f"its format must be {FOLDER_FORMAT}, got {str(config['format'])[:100]}: update the package"
            )
        if not isinstance(config.get("init_args"), dict):
            raise ValueError(f"init_args must hold arguments by name, got {type(config.get('init_args')).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be used: {first_line(error)}") from error
    return config


def load_module(
    path: File,
    map_location: Any = None,
    trusted: Iterable[Trusted] | Trusted = (),
    weights_only: bool | None = None,
    **kwargs: Any,
) -> Any:
    """Build the module of a checkpoint, whatever its class, with its weights.

    Args:
        path: File, or a folder as for :func:`read_checkpoint`.
        map_location: As in ``torch.load``.
        trusted: As in :meth:`CheckpointMixin.load_from_checkpoint`; must include the module's own class if it is not
            one of simo_lightning.
        weights_only: As in :func:`read_checkpoint`.
        kwargs: Arguments of the module, which replace those in the checkpoint.

    Returns:
        The module.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: As :meth:`CheckpointMixin.load_from_checkpoint`.
    """
    stored = _stored(read_checkpoint(path, "cpu", weights_only), path)
    cls: Any = _import(stored["class_path"], trusted, path)
    if not issubclass(cls, CheckpointMixin):
        raise ValueError(f"checkpoint {path} must be of a module of simo_lightning, got {class_path(cls)}")
    return cls.load_from_checkpoint(path, map_location, weights_only=weights_only, trusted=trusted, **kwargs)


def load_encoder(path: File, map_location: Any = None, trusted: Iterable[Trusted] | Trusted = ()) -> nn.Module:
    """The encoder of a checkpoint alone, with its weights; loss, optimizer and the rest are not built.

    Args:
        path: File, or a folder as for :func:`read_checkpoint`.
        map_location: As in ``torch.load``.
        trusted: As in :meth:`CheckpointMixin.load_from_checkpoint`.

    Returns:
        The module's ``encoder``. Its attribute ``preprocessing`` is that of the module, if the checkpoint has one:
        ``encoder(encoder.preprocessing(images))`` are the embeddings of uint8 images of any size. Its attribute
        ``classes`` holds the :class:`TrainingClasses`, if the checkpoint has them.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: As :meth:`CheckpointMixin.load_from_checkpoint`, or if the module has no encoder.
    """
    checkpoint = read_checkpoint(path, map_location)
    arguments = _stored(checkpoint, path)["init_args"]
    preprocessing = _preprocessing(arguments, path)
    encoder = _encoder(checkpoint, arguments.get("encoder"), path, map_location, trusted)
    if preprocessing is not None:
        setattr(encoder, "preprocessing", preprocessing)  # noqa: B010  # nn.Module declares only tensors and modules
    with _error_in_one_line(f"checkpoint {path} cannot be used"):
        classes = training_classes(checkpoint)
    if classes is not None:
        setattr(encoder, "classes", classes)  # noqa: B010
    return encoder


def training_classes(checkpoint: Mapping[str, Any]) -> TrainingClasses | None:
    """The classes that the model of a checkpoint was trained on.

    Args:
        checkpoint: As :func:`read_checkpoint` returns it.

    Returns:
        Names and means; None if the checkpoint does not hold them.

    Raises:
        ValueError: If they are not names and a matrix of as many rows.
    """
    stored = checkpoint.get(_KEY)
    found = stored.get("classes") if isinstance(stored, dict) else None
    if found is None:
        return None
    names = found.get("names") if isinstance(found, dict) else None
    means = found.get("means") if isinstance(found, dict) else None
    sound = isinstance(names, list) and all(type(name) is str for name in names)
    if isinstance(names, list) and means is not None:
        sound = sound and isinstance(means, Tensor) and means.is_floating_point() and means.ndim == 2
        sound = sound and len(means) == len(names) and not means.isinf().any()
    if not sound:
        raise ValueError(f"its classes must have names and one mean for each, got {str(found)[:100]}")
    return TrainingClasses(list(names or []), None if means is None else means.detach().float().cpu())


def _encoder(
    checkpoint: dict[str, Any], description: Any, path: File, map_location: Any, trusted: Iterable[Trusted] | Trusted
) -> nn.Module:
    if description is None:  # built inside the module
        encoder = getattr(load_module(path, map_location, trusted), "encoder", None)
        if not isinstance(encoder, nn.Module):
            raise ValueError(f"checkpoint {path} must be of a module with an encoder, got none")
        return encoder
    prefix, weights = "encoder.", checkpoint["state_dict"]
    weights = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    with MemoryLimit(weights), weights_follow():
        encoder = _argument("encoder", description, trusted, path)
    if not isinstance(encoder, nn.Module):
        raise ValueError(f"the encoder of checkpoint {path} must be an nn.Module, got {type(encoder).__name__}")
    check_weights(encoder, weights, path)
    encoder.load_state_dict(weights)
    return encoder.to(_device(weights))


def load_preprocessing(path: str | Path) -> Preprocessing | None:
    """The preprocessing of a checkpoint alone; its weights are not read.

    Args:
        path: File, or the folder of a sharded checkpoint.

    Returns:
        The preprocessing; None if the checkpoint has none, since an older version or another package wrote it, or holds
        more than plain data.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, or its preprocessing is not valid.
    """
    sharded = Path(path, SHARDED_REST)
    try:
        if sharded.is_file():
            checkpoint = torch.load(sharded, map_location="cpu", weights_only=True)
        else:
            checkpoint = read_checkpoint(path, "cpu", mmap=True)
    except (pickle.UnpicklingError, ValueError) as error:
        if isinstance(error, pickle.UnpicklingError) or isinstance(error.__cause__, pickle.UnpicklingError):
            return None  # what reads all of it decides whether it is trusted
        raise
    return _preprocessing(_init_args(checkpoint), path)


def adopt_preprocessing(module: nn.Module, path: str | Path) -> None:
    """Give a module the preprocessing of the checkpoint that is about to be loaded into it.

    A data module then reads images as the model does from the start. Does nothing if either has no preprocessing.

    Args:
        module: Changed if it has an attribute ``preprocessing``.
        path: As for :func:`load_preprocessing`.

    Raises:
        ValueError: As :func:`load_preprocessing`, or if another preprocessing was passed to the module.
    """
    if takes_preprocessing(module):
        _take_preprocessing(module, load_preprocessing(path), path)


def known_preprocessing(module: nn.Module) -> Preprocessing | None:
    """The preprocessing of a module; if it has none, that of its encoder if mean and std are known.

    Args:
        module: May have attributes ``preprocessing`` and ``encoder``.

    Returns:
        The preprocessing, or None.
    """
    own = getattr(module, "preprocessing", None)
    if isinstance(own, Preprocessing):
        return own
    inner = getattr(getattr(module, "encoder", None), "preprocessing", None)
    return inner if isinstance(inner, Preprocessing) and inner.mean is not None else None


def _take_preprocessing(module: Any, stored: Preprocessing | None, path: File) -> None:
    """Set the module's preprocessing to that of a file; raise if another one was passed to the module."""
    if stored is None:
        return
    passed = module.__dict__.get("_init_arguments", {}).get("preprocessing")
    given = passed["init_args"] if isinstance(passed, dict) and "init_args" in passed else {}
    stored.check_arguments(given, f"the preprocessing of {type(module).__name__}", f"checkpoint {path}")
    module.preprocessing = stored


def _preprocessing(arguments: Mapping[str, Any], path: File) -> Preprocessing | None:
    """The preprocessing among the arguments of a file; of no other class than Preprocessing."""
    description = arguments.get("preprocessing")
    if description is None:
        return None
    with _error_in_one_line(f"the preprocessing of checkpoint {path} cannot be used"):
        if not isinstance(description, dict) or description.get("class_path") != class_path(Preprocessing):
            raise ValueError(f"it must be a {class_path(Preprocessing)}, got {str(description)[:100]}")
        return Preprocessing(**description["init_args"])


def check_weights(module: nn.Module, weights: Mapping[str, Any], path: Any, strict: bool = True) -> None:
    """Check that weights fit a module, as ``load_state_dict`` does, but with an error of one line.

    Args:
        module: Module to load the weights into.
        weights: A ``state_dict``.
        path: File of the weights, for the message.
        strict: Whether the names must match exactly.

    Raises:
        ValueError: If a shape differs, or with ``strict`` a name; lists the first three.
    """
    own = module.state_dict()
    shared = [name for name in own if isinstance(own[name], Tensor) and isinstance(weights.get(name), Tensor)]
    found = [
        f"{name} has shape {tuple(weights[name].shape)} in the file and {tuple(own[name].shape)} in the model"
        for name in shared
        if own[name].shape != weights[name].shape
    ]
    if strict:
        found += [f"{name} is not in the file" for name in own if name not in weights]
        found += [f"{name} is not in the model" for name in weights if name not in own]
    if found:
        more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
        raise ValueError(f"checkpoint {path} does not fit {type(module).__name__}: {'; '.join(found[:3])}{more}")


def _stored(checkpoint: dict[str, Any], path: File) -> dict[str, Any]:
    stored = checkpoint.get(_KEY)
    if stored is None:
        raise ValueError(f"checkpoint {path} was not written by a module of simo_lightning: it has no {_KEY!r} entry")
    if isinstance(stored, dict) and "class" in stored:
        raise ValueError(
            f"checkpoint {path} is of simo_lightning 0.1, which stored the module's arguments as code: make the "
            "module, and give it the weights alone, module.load_state_dict(read_checkpoint(path)['state_dict'])"
        )
    if not isinstance(stored, dict) or not isinstance(stored.get("init_args"), dict):
        raise ValueError(
            f"checkpoint {path} must hold class_path and init_args in {_KEY!r}, got {type(stored).__name__}"
        )
    return stored


def _init_args(checkpoint: dict[str, Any]) -> Mapping[str, Any]:
    """The module's arguments in a checkpoint of any origin, none in a foreign one."""
    stored = checkpoint.get(_KEY) if isinstance(checkpoint, dict) else None
    arguments = stored.get("init_args") if isinstance(stored, dict) else None
    return arguments if isinstance(arguments, dict) else {}


def _argument(name: str, description: Any, trusted: Iterable[Trusted] | Trusted, path: File) -> Any:
    with _error_in_one_line(f"the argument {name!r} of checkpoint {path} cannot be built"):
        return build(description, trusted, name)


def _import(name: Any, trusted: Iterable[Trusted] | Trusted, path: File) -> type:
    with _error_in_one_line(f"the class of checkpoint {path} cannot be used"):
        return import_class(name, [trusted] if isinstance(trusted, Trusted) else list(trusted))


@contextmanager
def _error_in_one_line(context: str) -> Iterator[None]:
    """Turn any error, since a class may raise any for its arguments, into a ValueError of one line."""
    try:
        yield
    except NotStoredError:  # names the argument and what to do already
        raise
    except Exception as error:
        raise ValueError(f"{context}: {first_line(error)}") from error


def _from_hparams_file(cls: type, path: str | Path | None) -> dict[str, Any]:
    """Arguments of a class from a file, as Lightning's loggers write it; entries that begin with _ are Lightning's."""
    if path is None:
        return {}
    if Path(path).suffix.lower() == ".csv":
        found = load_hparams_from_tags_csv(path)
    elif Path(path).suffix.lower() in (".yaml", ".yml"):
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    else:
        raise ValueError(f"hparams_file must end in .yaml, .yml or .csv, got {path}")
    if not isinstance(found, dict):
        raise ValueError(f"hparams_file {path} must hold arguments by name, got {type(found).__name__}")
    parameters = signature(cls).parameters
    takes_all = any(each.kind is Parameter.VAR_KEYWORD for each in parameters.values())
    found = {str(name): value for name, value in found.items() if not str(name).startswith("_")}
    unknown = [name for name in found if name not in parameters and not takes_all]
    if unknown:
        raise ValueError(f"hparams_file {path} must hold arguments of {cls.__name__}, got {', '.join(unknown)}")
    return found


class MemoryLimit(TorchDispatchMode):
    """Limits the memory of all tensors created in this context, so that no number in a file can claim gigabytes.

    The limit is a multiple of the weights' size. A tensor counts for at least 32 KiB, as its layer takes memory too.

    Args:
        weights: The ``state_dict`` of the file.
    """

    def __init__(self, weights: Mapping[str, Any]) -> None:
        super().__init__()
        self.limit = _EXTRA_BYTES + 4 * sum(weight.nbytes for weight in weights.values() if isinstance(weight, Tensor))
        self.created = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = {each.untyped_storage().data_ptr() for each in _dense(args, kwargs)}
        expected = []
        if not inputs:  # the size of a new tensor is checked before its memory is taken
            with suppress(Exception):  # an operator without size or without meta device
                expected = _dense(func(*args, **{**kwargs, "device": torch.device("meta")}))
        self._count(expected)
        result = func(*args, **kwargs)
        if not expected:
            self._count([each for each in _dense(result) if each.untyped_storage().data_ptr() not in inputs])
        return result

    def _count(self, tensors: list[Tensor]) -> None:
        self.created += sum(max(tensor.nbytes, 2**15) for tensor in tensors)
        if self.created > self.limit:
            raise ValueError(f"it takes {self.created:,} bytes or more; its weights allow {self.limit:,}")


def _dense(*values: Any) -> list[Tensor]:
    return [each for each in tree_leaves(values) if isinstance(each, Tensor) and each.layout is torch.strided]


def _device(weights: Mapping[str, Any]) -> torch.device:
    return next((weight.device for weight in weights.values() if isinstance(weight, Tensor)), torch.device("cpu"))


def _plain_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``save_hyperparameters()`` that have a description, without Lightning's own entries."""
    named = {str(name): value for name, value in arguments.items() if not str(name).startswith("_")}
    config = {name: value for name, value in named.items() if isinstance(value, dict) and "class_path" in value}
    described = {name: config.get(name, describe(value)) for name, value in named.items()}
    return {name: value for name, value in described.items() if name in config or is_plain(value)}


_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, set)


def _plain(value: Any, where: str) -> Any:
    """A part of a checkpoint, with numpy numbers as Python numbers and numpy arrays as tensors."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return torch.from_numpy(value.copy())
    if isinstance(value, dict):
        items = {_plain(key, where): _plain(each, f"{where}.{key}") for key, each in value.items()}
        return OrderedDict(items) if type(value) is OrderedDict else items
    if type(value) in (list, tuple):
        return type(value)(_plain(each, f"{where}.{index}") for index, each in enumerate(value))
    if type(value) not in _PLAIN and not isinstance(value, Tensor):
        rank_zero_warn(
            f"the checkpoint holds a {type(value).__module__}.{type(value).__qualname__} in {where}: it can only be "
            "opened with weights_only=False"
        )
    return value
