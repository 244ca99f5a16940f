"""Images with maps of what their similarity comes from."""

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur, rgb_to_grayscale

from simo_lightning.plotting import canvas

_SMOOTHING = 1 / 48  # standard deviation of the smoothing of signed maps, of the shorter side

_LONGEST_LINE = 60  # characters of a title


def attribution_figure(images: Tensor, maps: Sequence[Tensor], names: Sequence[str], titles: Sequence[str]) -> Figure:
    """Each image in colour and, beside it, in grey below each of its maps.

    Positive values of a map are red and negative ones blue, fully at 99 % of the values; around 0 the image shows.
    Signed maps, as integrated gradients are, are noise from pixel to pixel, so they are drawn smoothed by a Gaussian of
    1/48 of the side.

    Args:
        images: uint8 ``(N, 1 or 3, H, W)``.
        maps: One ``(N, H, W)`` for each column after the first.
        names: Of the maps, above the columns.
        titles: Of the images, N, above the rows, with line breaks as they are.

    Returns:
        Figure of N rows and ``1 + len(maps)`` columns.

    Raises:
        ValueError: If shapes or numbers do not match.

    Example:
        >>> figure = attribution_figure(
        ...     torch.zeros(1, 3, 8, 8, dtype=torch.uint8), [torch.rand(1, 8, 8)], ["Grad-CAM"], ["cat"]
        ... )
        >>> [axes.get_xlabel() for axes in figure.axes]
        ['image', 'Grad-CAM']
    """
    images = canvas.on_cpu("images", images)
    maps = [canvas.on_cpu("maps", each).float() for each in maps]
    _check(images, maps, names, titles)
    rows, columns = len(images), 1 + len(maps)
    height = canvas.WIDTH / columns * images.shape[2] / images.shape[3] + 0.6
    figure = canvas.new_figure(max(1.0, rows * height))
    panels = figure.subplots(rows, columns, squeeze=False)
    grey = (rgb_to_grayscale(images) if images.shape[1] == 3 else images)[:, 0].numpy()
    for row, line in enumerate(panels):
        line[0].imshow(images[row].permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=255)
        for axes, values in zip(line[1:], maps, strict=True):
            shown = _smoothed(values[row])
            limit = max(float(shown.abs().flatten().quantile(0.99)), torch.finfo(torch.float32).tiny)
            axes.imshow(grey[row], cmap="gray", vmin=-80, vmax=255)  # lighter, so that the colours are seen
            strength = (shown.abs() / limit).clamp(max=1).sqrt()
            axes.imshow(shown.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, alpha=0.85 * strength.numpy(), zorder=2)
        for axes, name in zip(line, ("image", *names), strict=True):
            canvas.remove_ticks(axes)
            axes.set_xlabel(name, **canvas.LITERAL)
        middle = line[len(line) // 2] if columns % 2 else line[0]
        lines = titles[row].splitlines()
        canvas.set_title(middle, "\n".join(canvas.drawable(line, _LONGEST_LINE) for line in lines), size=10)
    return figure


def describe_attribution(maps: Sequence[Tensor], names: Sequence[str]) -> str:
    """Alternative text of one row of :func:`attribution_figure`.

    Args:
        maps: One ``(H, W)`` for each name.
        names: Of the maps.

    Returns:
        For each map, in which ninth of the image most of its positive part lies.

    Example:
        >>> describe_attribution([torch.eye(9)[:3]], ["Grad-CAM"])
        'Grad-CAM: of what raises the cosine, most is at the top left (33 % in that ninth of the image).'
    """
    return " ".join(f"{canvas.printable(name)}: {_where(values)}." for values, name in zip(maps, names, strict=True))


_NINTHS = [
    *("at the top left", "at the top", "at the top right", "at the left", "in the middle", "at the right"),
    *("at the bottom left", "at the bottom", "at the bottom right"),
]


def _where(values: Tensor) -> str:
    positive = values.detach().cpu().double().clamp(min=0)
    if not positive.any():
        return "no part of the image raises the cosine"
    sums = torch.stack([part.sum() for rows in positive.tensor_split(3, 0) for part in rows.tensor_split(3, 1)])
    most = int(sums.argmax())
    share = float(sums[most] / sums.sum())
    return f"of what raises the cosine, most is {_NINTHS[most]} ({100 * share:.0f} % in that ninth of the image)"


def _smoothed(values: Tensor) -> Tensor:
    """A signed map smoothed, another as it is; ``(H, W)``."""
    if not (values < 0).any():
        return values
    sigma = max(_SMOOTHING * min(values.shape), 0.1)
    kernel = [min(2 * round(3 * sigma) + 1, 2 * ((side - 1) // 2) + 1) for side in reversed(values.shape)]
    blurred: Tensor = gaussian_blur(values.unsqueeze(0), kernel, [sigma, sigma])
    return blurred.squeeze(0)


def _check(images: Tensor, maps: Sequence[Tensor], names: Sequence[str], titles: Sequence[str]) -> None:
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.dtype != torch.uint8 or len(images) == 0:
        raise ValueError(
            f"images must be uint8 of shape (N, 1 or 3, H, W), at least one, got {images.dtype} of shape "
            f"{tuple(images.shape)}"
        )
    expected = (len(images), *images.shape[2:])
    wrong = [tuple(each.shape) for each in maps if tuple(each.shape) != expected]
    if wrong:
        raise ValueError(f"maps must have shape {expected} to match images, got {wrong[0]}")
    if len(names) != len(maps) or len(titles) != len(images):
        raise ValueError(f"names and titles must be {len(maps)} and {len(images)}, got {len(names)} and {len(titles)}")
