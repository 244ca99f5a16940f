"""One colour and one marker per class, the same in every picture."""

import math
from collections.abc import Sequence

import torch
from matplotlib.colors import to_hex
from torch import Tensor

# Eight colours of Okabe & Ito ("Color Universal Design", 2008) and two more as far from them as they are apart: 17 or
# more in CIELAB, also as seen in protanopia and deuteranopia (simulated after Machado et al., IEEE TVCG 15(6), 2009)
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442", "#000000", "#CC33FF", "#FF0066")
_MARKERS = ("o", "^", "s", "D", "v", "P", "X", "<", ">", "p")  # one for each ten classes
_GOLDEN_TURN = (math.sqrt(5) - 1) / 2  # of a circle: successive hues stay far apart, however many there are
_LIGHTNESS = (0.45, 0.75, 0.6)  # OKLab, 0 black to 1 white; survives colour blindness
_CHROMA = 0.12  # nearly every hue exists in sRGB at these lightnesses
_DARK_INK_ABOVE = 0.18  # relative luminance at which black and white text contrast alike (WCAG 2)


def class_colors(num_classes: int) -> list[str]:
    """Colour of each class: the same index has the same colour however many classes there are.

    The first ten can be told apart with red-green colour blindness too. After them hues of like strength go round the
    circle of a perceptual colour space by the golden ratio, and :func:`class_markers` tell apart what colours cannot.

    Args:
        num_classes: C.

    Returns:
        C colours as ``#RRGGBB``.

    Example:
        >>> class_colors(2)
        ['#0072B2', '#E69F00']

    Source:
        Okabe & Ito, "Color Universal Design", 2008, and two more; from the eleventh OKLab (Ottosson, 2020).
    """
    more = (
        _oklch_to_hex(_LIGHTNESS[index % len(_LIGHTNESS)], _CHROMA, index * _GOLDEN_TURN)
        for index in range(len(_COLORS), num_classes)
    )
    return [*_COLORS[:num_classes], *more]


def class_markers(num_classes: int) -> list[str]:
    """Marker of each class: another one after every ten classes.

    Args:
        num_classes: C.

    Returns:
        C matplotlib markers.

    Example:
        >>> class_markers(11)[-2:]
        ['o', '^']
    """
    return [_MARKERS[index // len(_COLORS) % len(_MARKERS)] for index in range(num_classes)]


def ink_on(color: Sequence[float]) -> str:
    """Black on light colours, white on dark ones.

    Args:
        color: sRGB in 0..1, further channels ignored.

    Returns:
        "black" or "white", whichever contrasts more.

    Source:
        WCAG 2, relative luminance and contrast ratio.
    """
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in color[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "black" if luminance > _DARK_INK_ABOVE else "white"


def _oklch_to_hex(lightness: float, chroma: float, turn: float) -> str:
    """OKLCh, hue in turns of a circle, as sRGB; what sRGB lacks is clipped."""
    lab = _tensor([lightness, chroma * math.cos(math.tau * turn), chroma * math.sin(math.tau * turn)])
    to_cones = _tensor(
        [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.2914855480]]
    )
    to_rgb = _tensor(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = (to_rgb @ (to_cones @ lab) ** 3).clamp(0, 1)
    encoded = torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    red, green, blue = encoded.tolist()
    return to_hex((red, green, blue)).upper()


def _tensor(values: list[float] | list[list[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
