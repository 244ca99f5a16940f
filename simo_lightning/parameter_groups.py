"""Parameter groups of an optimizer: rates and weight decay by the part of the module that a parameter belongs to."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torchvision.models.resnet import ResNet

_EMBEDDINGS = ("pos_embed", "pos_embedding", "cls_token", "class_token", "reg_token", "dist_token", "mask_token")
_BIAS_TABLE = "relative_position_bias_table"


@dataclass(frozen=True)
class ParameterGroups:
    """Learning rates and weight decay of the backbone, the projector and the loss.

    Rates are factors of the optimizer's own rate, and schedules keep them. Each group has a ``name``, by which
    Lightning's LearningRateMonitor logs it.

    Args:
        backbone_lr_factor: Factor for the backbone, > 0; 0.1 is usual for a pretrained one.
        layer_decay: Further factor per layer of the backbone, in (0, 1], from its last layer towards the images: the
            last layer gets ``layer_decay``, the one before ``layer_decay ** 2``. Layers are the stem and the stages of
            a ResNet, timm's own grouping, or else the children in the order of the module.
        loss_lr_factor: Factor for the parameters of the loss, such as class vectors and proxies, > 0.
        norm_weight_decay: Weight decay of biases, norms, and position and class tokens, >= 0; None: the optimizer's.
        loss_weight_decay: Weight decay of the parameters of the loss, >= 0; None: the optimizer's.

    Raises:
        ValueError: If a number is out of its range.

    Example:
        >>> import torch
        >>> from simo_lightning import ImageEncoder, SimOModule
        >>> module = SimOModule(ImageEncoder("resnet10", width=0.125))
        >>> optimizer = ParameterGroups(backbone_lr_factor=0.1).optimizer(torch.optim.AdamW, module)
        >>> {group["name"]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups[:3]}
        {'backbone': (0.0001, 0.01), 'backbone/norm': (0.0001, 0.0), 'projector': (0.001, 0.01)}

    Source:
        Layer-wise decay: Clark et al., arXiv 2003.10555 (ELECTRA), and Bao et al., arXiv 2106.08254 (BEiT), where the
        last block has the factor ``layer_decay`` as here.
    """

    backbone_lr_factor: float = 1.0
    layer_decay: float = 1.0
    loss_lr_factor: float = 1.0
    norm_weight_decay: float | None = 0.0
    loss_weight_decay: float | None = 0.0

    def __post_init__(self) -> None:
        for name in ("backbone_lr_factor", "loss_lr_factor"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}; FreezeBackbone trains none of it")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay must lie in (0, 1], got {self.layer_decay}")
        for name in ("norm_weight_decay", "loss_weight_decay"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name} must be at least 0 or None, got {value}")

    def groups(self, module: nn.Module) -> list[dict[str, Any]]:
        """Groups of a module's parameters.

        Args:
            module: With ``encoder`` (whose ``backbone`` is the backbone) and ``loss``, as SimOModule. Parameters that
                require no gradient are left out.

        Returns:
            Dictionaries with ``params``, ``name``, ``lr_factor`` and, where it is set here, ``weight_decay``; in the
            order of the module, groups without parameters left out.

        Raises:
            ValueError: If a rate of the backbone is set and the module has none.
        """
        backbone = getattr(getattr(module, "encoder", None), "backbone", None)
        if not isinstance(backbone, nn.Module):
            if self.backbone_lr_factor != 1 or self.layer_decay != 1:
                raise ValueError(
                    "backbone_lr_factor and layer_decay need an encoder with a backbone, got "
                    f"{type(getattr(module, 'encoder', module)).__name__} without it"
                )
            backbone = None
        layers = {} if backbone is None else _layers(backbone)
        depth = max(layers.values(), default=0) + 1
        spared = _named_embeddings(backbone)
        groups: dict[str, dict[str, Any]] = {}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            own = name.removeprefix("encoder.backbone.")
            if backbone is not None and own != name:
                layer = layers[own]
                part = "backbone" if self.layer_decay == 1 else f"backbone/layer_{layer}"
                factor = self.backbone_lr_factor * self.layer_decay ** (depth - layer)
                decay = self.norm_weight_decay if _is_spared(own, parameter.ndim, spared) else None
            elif name.startswith("loss."):
                part, factor, decay = "loss", self.loss_lr_factor, self.loss_weight_decay
            else:
                part, factor = ("projector" if name.startswith("encoder.projector.") else "encoder"), 1.0
                decay = self.norm_weight_decay if _is_spared(name, parameter.ndim, spared) else None
            if decay is not None and part != "loss":
                part += "/norm"
            group = groups.setdefault(part, {"params": [], "name": part, "lr_factor": factor})
            group["params"].append(parameter)
            if decay is not None:
                group["weight_decay"] = decay
        return list(groups.values())

    def optimizer(self, make: Callable[[Any], Optimizer], module: nn.Module) -> Optimizer:
        """An optimizer with these groups.

        Args:
            make: Maps parameter groups to an optimizer.
            module: As for :meth:`groups`.

        Returns:
            The optimizer; the rate of each group is its own rate times ``lr_factor``.

        Raises:
            ValueError: As :meth:`groups`, or if no parameter requires a gradient.
        """
        groups = self.groups(module)
        if not groups:
            raise ValueError("at least one parameter must require a gradient, got none")
        optimizer = make(groups)
        for group in optimizer.param_groups:
            group["lr"] *= group["lr_factor"]
        return optimizer


def _is_spared(name: str, ndim: int, embeddings: Iterable[str]) -> bool:
    """Whether a parameter is a bias, of a norm, or a table of tokens or positions."""
    last = name.rpartition(".")[2]
    return ndim <= 1 or name in embeddings or last in _EMBEDDINGS or last == _BIAS_TABLE


def _named_embeddings(backbone: nn.Module | None) -> set[str]:
    """Names that a model of timm lists itself."""
    listed: Any = getattr(backbone, "no_weight_decay", None)
    return set(listed()) if callable(listed) else set()


def _layers(backbone: nn.Module) -> dict[str, int]:
    """Number of the layer of each parameter by name, 0 at the images."""
    names = [name for name, _ in backbone.named_parameters()]
    if isinstance(backbone, ResNet):
        stages = {f"layer{number}": number for number in range(1, 5)}
        return {name: stages.get(name.partition(".")[0], 0) for name in names}
    matcher: Any = getattr(backbone, "group_matcher", None)
    if callable(matcher):
        from timm.models import group_parameters

        found: dict[Any, list[str]] = group_parameters(backbone, matcher(coarse=False))
        return {name: number for number, members in enumerate(found.values()) for name in members}
    parts = _parts(backbone)
    numbers: dict[str, int] = {}
    order: dict[str, int] = {}
    for name in names:
        part = next((part for part in parts if name.startswith(f"{part}.")), None)
        # a parameter of the module itself, such as a class token, is an input
        numbers[name] = 0 if part is None else order.setdefault(part, len(order))
    return numbers


def _parts(module: nn.Module, prefix: str = "", total: int = 0) -> list[str]:
    """Names of the children, in their order; one that holds most of the parameters is replaced by its children."""
    total = total or _size(module)
    found: list[str] = []
    for name, child in module.named_children():
        inner = _parts(child, f"{prefix}{name}.", total) if 2 * _size(child) > total else []
        found += inner if len(inner) > 1 else [f"{prefix}{name}"]
    return found


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
