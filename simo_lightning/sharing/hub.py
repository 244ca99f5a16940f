"""The model as huggingface_hub saves and uploads it; importing this module imports that library."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from huggingface_hub import ModelCard, ModelHubMixin
from torch import Tensor

from simo_lightning.sharing.card import TAGS, CardFields, model_card
from simo_lightning.sharing.files import write_pretrained


class HubModel(ModelHubMixin, library_name="simo_lightning", tags=[*TAGS], pipeline_tag="image-feature-extraction"):
    """A module with the methods ``save_pretrained`` and ``push_to_hub`` of huggingface_hub.

    Args:
        module: To be saved.
        config: Content of config.json.
        weights: Content of model.safetensors.
        card: What the model card says, or its whole text.
        repo_id: Name of the model, for the code in the card.
        step: Of the weights, for the metrics in the card.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        config: dict[str, Any],
        weights: dict[str, Tensor],
        card: CardFields | str | None,
        repo_id: str,
        step: int | None,
    ) -> None:
        self.config, self.weights = config, weights
        text = card if isinstance(card, str) else model_card(module, config, card or CardFields(), repo_id, step)
        self.card = text if isinstance(text, ModelCard) else ModelCard(text)

    def _save_pretrained(self, save_directory: Path) -> None:
        write_pretrained(self.config, self.weights, save_directory)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The model card."""
        return self.card
