"""Colour and marker of each class, the same in every figure."""

from matplotlib import colormaps
from matplotlib.colors import to_hex

# Eight colours of Okabe & Ito ("Color Universal Design", 2008) and two more, all pairs 17 or
# more apart in CIELAB, also in protanopia and deuteranopia (simulated after Machado et al., IEEE TVCG 15(6), 2009)
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442", "#000000", "#CC33FF", "#FF0066")
_MARKERS = ("o", "^", "s", "D", "v", "P", "X", "<", ">", "p")  # one per ten classes
_GOLDEN_RATIO = (5**0.5 - 1) / 2  # multiples modulo 1 are spread evenly for any number of classes


def class_colors(num_classes: int) -> list[str]:
    """Colour of each class, independent of the number of classes.

    The first ten are distinguishable with red-green colour blindness. The others are spread over matplotlib's colormap
    turbo and are distinguished also by :func:`class_markers`.

    Args:
        num_classes: C.

    Returns:
        C colours as ``#RRGGBB``.

    Example:
        >>> class_colors(2)
        ['#0072B2', '#E69F00']

    Source:
        Okabe & Ito, "Color Universal Design", 2008, and two more.
    """
    values = [index * _GOLDEN_RATIO % 1 for index in range(len(_COLORS), num_classes)]
    return [*_COLORS[:num_classes], *(to_hex(color).upper() for color in colormaps["turbo"](values))]


def class_markers(num_classes: int) -> list[str]:
    """Marker of each class, which changes after every ten classes.

    Args:
        num_classes: C.

    Returns:
        C matplotlib markers.

    Example:
        >>> class_markers(11)[-2:]
        ['o', '^']
    """
    return [_MARKERS[index // len(_COLORS) % len(_MARKERS)] for index in range(num_classes)]
