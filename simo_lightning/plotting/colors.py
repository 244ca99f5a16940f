"""One colour and one marker per class, the same in every figure."""

from matplotlib import colormaps
from matplotlib.colors import to_hex

# Eight colours of Okabe & Ito ("Color Universal Design", 2008) and two more as far from them as they are apart: 17 or
# more in CIELAB, also as seen in protanopia and deuteranopia (simulated after Machado et al., IEEE TVCG 15(6), 2009)
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442", "#000000", "#CC33FF", "#FF0066")
_MARKERS = ("o", "^", "s", "D", "v", "P", "X", "<", ">", "p")  # one for each ten classes
_GOLDEN_RATIO = (5**0.5 - 1) / 2  # its multiples, modulo 1, are spread evenly however many there are


def class_colors(num_classes: int) -> list[str]:
    """Colour of each class, independent of the number of classes.

    The first ten can be told apart with red-green colour blindness too. The others are spread over matplotlib's
    colormap turbo, and :func:`class_markers` tell apart what colours cannot.

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
    places = [index * _GOLDEN_RATIO % 1 for index in range(len(_COLORS), num_classes)]
    return [*_COLORS[:num_classes], *(to_hex(color).upper() for color in colormaps["turbo"](places))]


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
