"""ImageEncoder: a backbone and a projector."""

from dataclasses import replace
from inspect import Parameter, signature
from typing import Any, Literal

from torch import Tensor, nn

from simo_lightning.class_paths import InitArgumentsMixin, describe
from simo_lightning.encoders.backbones import Request, named_backbone, refuse
from simo_lightning.encoders.resnet import Norm, Stem, norm_layer
from simo_lightning.preprocessing import Preprocessing


class ImageEncoder(InitArgumentsMixin, nn.Module):
    """Images to embeddings: ``projector(backbone(images))``.

    The classifier of a named backbone is removed; its inputs are the features.

    Args:
        backbone: A ResNet (resnet10, 18, 34, 50, 101, 152), any other torchvision classification model by name, any
            model of timm as ``timm/NAME`` (the extra ``timm``), or a module that maps images to features ``(N, F)`` or
            ``(N, F, 1, 1)``.
        weights: Trained weights of a named backbone. None: random ones. Of torchvision by name, such as DEFAULT or
            IMAGENET1K_V2; of timm ``pretrained`` or a tag, such as a1_in1k; or a file: .safetensors, or .pth, .pt, .bin
            or .ckpt as ``torch.save`` writes it. In a file, the tensors may lie under a prefix such as ``module.`` or
            ``encoder.backbone.``, and those of a classifier are ignored. A file runs no code. For ``in_channels`` 1 the
            first convolution is summed over RGB.
        image_size: Side of the images in pixels. It sets the size in ``preprocessing`` and the default of ``stem``, and
            the size of a vision transformer, whose position embeddings are interpolated. None: that of the weights.
        embedding_dim: Dimension D of the embeddings; None for that of the features.
        projector: Maps features to embeddings. none: the identity; linear: one linear layer; mlp: linear, norm, ReLU,
            linear.
        hidden_dim: Width inside the mlp projector; None for that of the features.
        norm: Normalisation of the backbone and the mlp projector. batch: BatchNorm; layer: LayerNorm over channels and
            positions, the paper's choice; group: GroupNorm with 32 groups, or the largest smaller number that divides
            the channels. None: the backbone's own.
        stem: First layers of a ResNet. imagenet: torchvision's, stride 4 in all; small: one 3 x 3 convolution of stride
            1, for images of about 32 pixels; small_stride2: the same with stride 2, a quarter of the work. None: as the
            weights have it; without weights small if ``image_size`` is at most 64, else imagenet. Other backbones have
            their own.
        width: Multiplier of all channels of a ResNet, such as 0.5 for 32 to 256 instead of 64 to 512.
        in_channels: Channels of the images.
        feature_dim: F of a backbone given as a module; None for its attribute ``feature_dim``.
        preprocessing: How images become the input. None: that of the weights (for a file that of the backbone's default
            weights), with ``image_size`` if it is given; without weights only the size is known, if it is given.

    Attributes:
        backbone: The module without its classifier.
        embedding_dim: D.
        feature_dim: F.
        preprocessing: A :class:`~simo_lightning.preprocessing.Preprocessing`, or None.
        stem: First layers of a ResNet; None for other backbones.

    Raises:
        ValueError: If an argument does not fit another one or the backbone; or if weights are neither on this machine
            nor can be downloaded, or do not fit.

    Example:
        >>> import torch
        >>> encoder = ImageEncoder("resnet10", embedding_dim=16, width=0.25, image_size=32)
        >>> encoder.stem, encoder.feature_dim, encoder(torch.zeros(2, 3, 32, 32)).shape
        ('small', 128, torch.Size([2, 16]))

    A checkpoint holds the weights themselves and the preprocessing: a trained file needs neither the network nor the
    file of weights.

    Source:
        The paper (arXiv 2410.05233) trains a ResNet-18 with LayerNorm and, as we recall it, D = 16. The axes of its
        LayerNorm are not public; ours is GroupNorm with one group, over channels and positions. The stem "small" is
        the usual one for CIFAR (He et al., arXiv 1512.03385, and SimCLR, arXiv 2002.05709, B.9).
    """

    path_arguments = ("weights",)  # never taken from a checkpoint

    def __init__(
        self,
        backbone: str | nn.Module = "resnet18",
        weights: str | None = None,
        image_size: int | None = None,
        embedding_dim: int | None = 16,
        projector: Literal["none", "linear", "mlp"] = "linear",
        hidden_dim: int | None = None,
        norm: Norm | None = None,
        stem: Stem | None = None,
        width: float = 1.0,
        in_channels: int = 3,
        feature_dim: int | None = None,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        super().__init__()
        _check_choice("norm", norm, (None, "batch", "layer", "group"))
        _check_choice("stem", stem, (None, "imagenet", "small", "small_stride2"))
        sizes = {"embedding_dim": embedding_dim, "hidden_dim": hidden_dim, "in_channels": in_channels}
        for name, value in {**sizes, "image_size": image_size}.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.in_channels: int | None = in_channels
        self.min_size, self.stem = (1, 1), None
        known: Preprocessing | None = None
        if isinstance(backbone, nn.Module):
            refuse("a backbone given as a module", stem=stem, width=width, in_channels=in_channels)
            if weights is not None:
                raise ValueError(f"weights are only for a backbone given by name, got {weights!r} and a module")
            self.in_channels = None  # unknown for a module
            self.backbone, self.feature_dim = backbone, _declared_feature_dim(backbone, feature_dim)
        else:
            if feature_dim is not None:
                raise ValueError(f"feature_dim is only for a backbone given as a module, got {feature_dim}")
            if weights is not None and in_channels not in (1, 3):
                raise ValueError(f"in_channels must be 1 or 3 with weights, got {in_channels}")
            made = named_backbone(Request(backbone, weights, image_size, norm, stem, width, in_channels))
            self.backbone, self.feature_dim, self.min_size, known, self.stem = made
        self.preprocessing = _preprocessing(preprocessing, known, image_size, in_channels)
        self.embedding_dim = self.feature_dim if embedding_dim is None else embedding_dim
        self.projector = _projector(projector, self.feature_dim, self.embedding_dim, hidden_dim, norm)
        self._describe_without_weights()

    def _describe_without_weights(self) -> None:
        """Let a checkpoint describe what the weights have set, since it holds the weights themselves."""
        stored = self.__dict__.get("_init_arguments", {})
        parameters = signature(type(self)).parameters  # of a subclass, which may take fewer
        takes_all = any(each.kind is Parameter.VAR_KEYWORD for each in parameters.values())
        changed: dict[str, Any] = {"stem": self.stem} if self.stem is not None else {}
        if stored.get("weights") is not None:
            changed |= {"weights": None, "preprocessing": describe(self.preprocessing)}
        stored |= {name: value for name, value in changed.items() if takes_all or name in parameters}

    def features(self, images: Tensor) -> Tensor:
        """Outputs of the backbone, before the projector.

        Args:
            images: Float tensor ``(N, in_channels, H, W)``.

        Returns:
            Features ``(N, feature_dim)``.

        Raises:
            ValueError: If the images have another shape or are too small for the backbone, or the backbone does not
                return ``feature_dim`` features per image.
        """
        if self.in_channels is not None and (images.ndim != 4 or images.shape[1] != self.in_channels):
            raise ValueError(f"images must have shape (N, {self.in_channels}, H, W), got {tuple(images.shape)}")
        try:
            features = self.backbone(images)
        except (AssertionError, RuntimeError) as error:
            if images.shape[-2] >= self.min_size[0] and images.shape[-1] >= self.min_size[1]:
                raise
            raise ValueError(
                f"images must be at least {self.min_size[0]} x {self.min_size[1]} pixels for this backbone, "
                f"got {images.shape[-2]} x {images.shape[-1]}"
            ) from error
        if isinstance(features, Tensor) and features.ndim == 4 and features.shape[2:] == (1, 1):
            features = features.flatten(1)
        if not isinstance(features, Tensor) or features.ndim != 2 or features.shape[1] != self.feature_dim:
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"backbone must return features of shape (N, feature_dim={self.feature_dim}), got {got}")
        return features

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings of images.

        Args:
            images: Float tensor ``(N, in_channels, H, W)``.

        Returns:
            Embeddings ``(N, embedding_dim)``, not normalised.

        Raises:
            ValueError: As :meth:`features`.
        """
        return self.projector(self.features(images))


def _declared_feature_dim(backbone: nn.Module, feature_dim: int | None) -> int:
    found = getattr(backbone, "feature_dim", None) if feature_dim is None else feature_dim
    if not isinstance(found, int) or found < 1:
        raise ValueError(
            f"feature_dim, the features per image, must be given for a backbone without that attribute, got {found!r} "
            f"for {type(backbone).__name__}"
        )
    return found


def _projector(kind: str, features: int, embedding: int, hidden: int | None, norm: Norm | None) -> nn.Module:
    _check_choice("projector", kind, ("none", "linear", "mlp"))
    if hidden is not None and kind != "mlp":
        raise ValueError(f"hidden_dim is only for projector='mlp', got hidden_dim={hidden} with projector={kind!r}")
    if kind == "none":
        if embedding != features:
            raise ValueError(
                f"projector='none' returns the {features} features unchanged: embedding_dim must be {features} or "
                f"None, got {embedding}"
            )
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(features, embedding)
    hidden = features if hidden is None else hidden
    middle = nn.BatchNorm1d(hidden) if norm in (None, "batch") else norm_layer(norm)(hidden)
    return nn.Sequential(nn.Linear(features, hidden), middle, nn.ReLU(inplace=True), nn.Linear(hidden, embedding))


def _check_choice(name: str, value: str | None, choices: tuple[str | None, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _preprocessing(
    given: Preprocessing | None, known: Preprocessing | None, image_size: int | None, in_channels: int
) -> Preprocessing | None:
    """That of the weights or the one given, at the size given."""
    found = known if given is None else given
    if given is not None and image_size is not None and given.size != (image_size, image_size):
        raise ValueError(f"image_size must be that of preprocessing, {given.image_size}, or None, got {image_size}")
    if image_size is None or given is not None:
        return found
    if found is not None:
        return replace(found, image_size=image_size)
    return Preprocessing(image_size, channels=in_channels) if in_channels in (1, 3) else None
