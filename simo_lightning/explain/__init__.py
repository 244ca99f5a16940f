"""Why an image is similar to a class or to another image: shares, nearest images, and where in the picture."""

from simo_lightning.explain.attribution import Attribution, attribution, last_feature_map
from simo_lightning.explain.explanation import Explanation, Neighbor, View, explain
from simo_lightning.explain.page import write_explanation

__all__ = [
    "Attribution",
    "Explanation",
    "Neighbor",
    "View",
    "attribution",
    "explain",
    "last_feature_map",
    "write_explanation",
]
