"""A trained model as a folder and on the Hugging Face Hub: safetensors, config.json and a model card.

The methods are those of huggingface_hub's ``ModelHubMixin``, which this package imports only when they are called.
"""

from simo_lightning.sharing.card import CardFields
from simo_lightning.sharing.files import download_pretrained, pretrained_config
from simo_lightning.sharing.mixin import SharingMixin

__all__ = ["CardFields", "SharingMixin", "download_pretrained", "pretrained_config"]
