"""How a data module and a model agree on one preprocessing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from simo_lightning.preprocessing import Preprocessing


@dataclass(frozen=True)
class Agreement:
    """The preprocessing as far as it is known before an image is read.

    Args:
        preprocessing: The preprocessing; mean and std may be None.
        fixed: Which of ``image_size`` and ``channels`` the model or an argument sets. The others follow the images.
    """

    preprocessing: Preprocessing
    fixed: frozenset[str]

    def completed(self, shape: tuple[int, ...]) -> Preprocessing:
        """The preprocessing for training images of ``shape``, ``(C, H, W)``.

        Raises:
            ValueError: If the images do not have the channels of the model.
        """
        preprocessing, (channels, height, width) = self.preprocessing, shape
        if channels != preprocessing.channels:
            if "channels" in self.fixed:
                raise ValueError(
                    f"the images must have the {preprocessing.channels} channels that the model takes, got {channels}"
                )
            preprocessing = replace(preprocessing, channels=channels)
        if "image_size" not in self.fixed:
            preprocessing = replace(preprocessing, image_size=height if height == width else (height, width))
        return preprocessing


def agree(given: Mapping[str, Any], module: Any, owner: str) -> Agreement:
    """Combine the preprocessing of a model with the arguments of a data module.

    A module's ``preprocessing`` is binding. If it has none, the arguments come first, then the ``preprocessing`` of its
    encoder, then the defaults. Mean and std that nobody sets stay None.

    Args:
        given: Fields of the preprocessing that the data module sets.
        module: May have attributes ``preprocessing`` and ``encoder``; None: no model.
        owner: Name of the data module, for the error.

    Returns:
        The agreement.

    Raises:
        ValueError: If an argument contradicts the module's preprocessing.
    """
    own, encoder = getattr(module, "preprocessing", None), getattr(module, "encoder", None)
    default, in_channels = getattr(encoder, "preprocessing", None), getattr(encoder, "in_channels", None)
    default = default if isinstance(default, Preprocessing) else None
    if isinstance(own, Preprocessing):
        own.check_arguments(given, owner)
        if own.mean is None:
            values = given if "mean" in given else vars(default or own)
            own = replace(own, mean=values["mean"], std=values["std"])
        return Agreement(own, frozenset({"image_size", "channels"}))
    fixed = {"image_size"} & given.keys() | ({"image_size", "channels"} if default else set())
    if default is None:
        channels = len(given.get("mean", "rgb"))
        if isinstance(in_channels, int):
            channels, fixed = in_channels, fixed | {"channels"}
        default = Preprocessing(channels=channels)
    return Agreement(replace(default, **given), frozenset(fixed))


def read_alike(one: Preprocessing, other: Preprocessing) -> bool:
    """Whether both read an image file as the same pixels; mean and std may differ."""
    return replace(one, mean=None, std=None) == replace(other, mean=None, std=None)


def warn_of_stem(encoder: Any, size: tuple[int, int]) -> None:
    """Warn, in one line, if the first layers of a ResNet do not suit the size of its images.

    Args:
        encoder: May have an attribute ``stem``, "small" or "imagenet".
        size: Height and width in pixels.
    """
    stem, side = getattr(encoder, "stem", None), min(size)
    if stem == "small" and side >= 96:
        rank_zero_warn(
            f"the encoder's stem 'small' suits images of about 32 px, not of {side} px: each image costs 16 times the "
            "work of stem 'imagenet'"
        )
    if stem == "imagenet" and side <= 48:
        last = -(-side // 32)
        rank_zero_warn(
            f"the encoder's stem 'imagenet' suits images of about 224 px, not of {side} px: its last features have "
            f"{last} x {last} pixels; stem 'small' keeps more of the image"
        )
