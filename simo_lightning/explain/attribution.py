"""Where in an image its similarity to a direction comes from."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from simo_lightning.extras import import_extra

Method = Literal["integrated_gradients", "grad_cam"]
_BATCH = 16  # images in a forward pass of integrated gradients


class Attribution(NamedTuple):
    """What each position of an image contributes to a cosine.

    Attributes:
        maps: float32 ``(N, H, W)``, of the size of the images.
        cosines: Cosine of each embedding with the direction, ``(N,)``.
        baseline_cosine: The same of the baseline, a scalar, for integrated gradients; else None.
        delta: ``maps.sum((1, 2)) - (cosines - baseline_cosine)``, ``(N,)``, the error of the approximation of the
            integral by a sum, for integrated gradients; else None.
    """

    maps: Tensor
    cosines: Tensor
    baseline_cosine: Tensor | None = None
    delta: Tensor | None = None


def attribution(
    encoder: nn.Module,
    images: Tensor,
    direction: Tensor,
    method: Method = "integrated_gradients",
    steps: int = 64,
) -> Attribution:
    """Attribute the cosine of each embedding with a direction to the positions of its image, by Captum.

    With ``f(x) = cos(encoder(x), direction)``:

    - integrated_gradients: ``(x - b) * mean of grad f over the straight line from b to x``, summed over the channels.
      The baseline b is 0, which for normalised images is the mean colour of the training images. The map sums to
      ``f(x) - f(b)``; a position is negative where the image lowers the cosine. Any differentiable encoder.
    - grad_cam: ``relu(sum_k a_k A_k)`` with the feature maps A_k of :func:`last_feature_map` and the mean a_k of the
      gradient of f over the positions of A_k, enlarged bilinearly. It is >= 0 and coarse. Convolutional encoders only.

    A map shows what the encoder's output depends on, not whether it is right. The encoder is in evaluation mode
    meanwhile, and its gradients are not changed.

    Args:
        encoder: Maps images to embeddings ``(N, D)``.
        images: Normalised images, float ``(N, C, H, W)``, on the encoder's device; of uint8 images by
            :meth:`Preprocessing.__call__() <simo_lightning.preprocessing.Preprocessing>`.
        direction: The mean of a class or the embedding of another image, of any length but 0, ``(D,)``.
        method: See above.
        steps: Points of the Gauss-Legendre quadrature of integrated gradients.

    Returns:
        The maps, the cosines, and how far integrated gradients are from complete.

    Raises:
        ModuleNotFoundError: If captum, of the extra ``explain``, is missing.
        ValueError: If an argument has a wrong shape, type or value, or the encoder has no map of features for grad_cam.

    Example:
        >>> encoder = nn.Sequential(nn.Flatten(), nn.Linear(16, 4, bias=False), nn.Linear(4, 3))
        >>> images = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        >>> result = attribution(encoder, images, torch.tensor([1.0, 0.0, 0.0]))
        >>> result.maps.shape, bool(result.delta.abs().max() < 1e-3)
        (torch.Size([2, 4, 4]), True)

    Source:
        Sundararajan, Taly & Yan, ICML 2017 (arXiv 1703.01365); Selvaraju et al., ICCV 2017 (arXiv 1610.02391), whose
        score of a class is here a cosine. Of the methods that Adebayo et al., NeurIPS 2018 (arXiv 1810.03292) compare,
        Grad-CAM passes their sanity check, that the map depends on the weights, and integrated gradients still show
        edges of the image with random weights.
    """
    _check(images, direction, method, steps)
    captum: Any = import_extra("captum.attr")
    direction = direction.detach().clone().to(images)  # a copy, as Autograd refuses tensors of the inference mode
    images = images.detach().clone().requires_grad_()

    def cosine(batch: Tensor) -> Tensor:
        embeddings = encoder(batch)
        if embeddings.shape[1] != len(direction):
            raise ValueError(
                f"direction must have the {embeddings.shape[1]} dimensions of the embeddings, got {len(direction)}"
            )
        return cosine_similarity(embeddings, direction.unsqueeze(0), dim=1)

    training = {module: module.training for module in encoder.modules()}
    encoder.eval()
    try:
        with torch.inference_mode(False), torch.enable_grad():
            cosines = cosine(images).detach()
            if method == "grad_cam":
                layer = last_feature_map(encoder, images[:1])
                if layer is None:
                    raise ValueError(
                        f"encoder must be convolutional for method 'grad_cam': {type(encoder).__name__} has no "
                        "convolution with a map of features"
                    )
                coarse = captum.LayerGradCam(cosine, layer).attribute(images, relu_attributions=True)
                maps = captum.LayerAttribution.interpolate(coarse, tuple(images.shape[2:]), "bilinear")
                return Attribution(maps.squeeze(1).detach(), cosines)
            maps = captum.IntegratedGradients(cosine).attribute(
                images,
                baselines=0.0,
                n_steps=steps,
                method="gausslegendre",
                internal_batch_size=max(_BATCH, len(images)),
            )
            maps = maps.sum(dim=1).detach().float()
            baseline = cosine(torch.zeros_like(images[:1])).detach().squeeze(0)
            return Attribution(maps, cosines, baseline, maps.sum(dim=(1, 2)) - (cosines - baseline))
    finally:
        for module, mode in training.items():
            module.training = mode


def last_feature_map(encoder: nn.Module, images: Tensor) -> nn.Module | None:
    """The last module whose output is a map of features ``(N, K, h, w)``, at the last convolution or after it.

    In a ResNet that is its last stage: the sum of the last convolution's output and the shortcut, after the ReLU.

    Args:
        encoder: Maps images to embeddings.
        images: Normalised images ``(N, C, H, W)``; one is enough.

    Returns:
        The module. None if the encoder has no convolution of more than one position, or none but the patch embedding of
        a transformer (a convolution whose stride is the size of its kernel).

    Example:
        >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> last_feature_map(encoder, torch.zeros(1, 3, 16, 16))
        ReLU()
    """
    convolution: nn.Conv2d | None = None
    size: tuple[int, ...] | None = None
    found: nn.Module | None = None

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal convolution, size, found
        if not isinstance(output, Tensor) or output.ndim != 4 or output.shape[2] * output.shape[3] == 1:
            return
        if isinstance(module, nn.Conv2d):
            convolution, size = module, tuple(output.shape[2:])
        if tuple(output.shape[2:]) == size:
            found = module

    handles = [module.register_forward_hook(note) for module in encoder.modules()]
    try:
        with torch.no_grad():
            encoder(images)
    finally:
        for handle in handles:
            handle.remove()
    if convolution is None or (convolution.stride == convolution.kernel_size and max(convolution.stride) > 1):
        return None
    return found


def _check(images: Tensor, direction: Tensor, method: str, steps: int) -> None:
    if method not in ("integrated_gradients", "grad_cam"):
        raise ValueError(f"method must be 'integrated_gradients' or 'grad_cam', got {method!r}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if images.ndim != 4 or not images.is_floating_point() or len(images) == 0:
        raise ValueError(
            f"images must be normalised floats of shape (N, C, H, W), at least one, got {images.dtype} of shape "
            f"{tuple(images.shape)}"
        )
    if direction.ndim != 1 or not direction.isfinite().all() or not direction.any():
        raise ValueError(
            f"direction must be finite and not zero, of shape (D,), got {direction.dtype} of shape "
            f"{tuple(direction.shape)}"
        )
