"""What happens to an image before it is embedded: decoding, resizing and normalisation."""

from simo_lightning.preprocessing.decode import FORMATS, Decoder
from simo_lightning.preprocessing.preprocessing import (
    Interpolation,
    Preprocessing,
    Resize,
    encoder_input,
    takes_preprocessing,
)

__all__ = ["FORMATS", "Decoder", "Interpolation", "Preprocessing", "Resize", "encoder_input", "takes_preprocessing"]
