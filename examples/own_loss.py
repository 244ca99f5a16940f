"""Another loss is any module (embeddings, labels) -> scalar: here supervised contrastive loss in ten lines.

    python examples/own_loss.py

On the command line, give its class path, in the folder of this file:

    simo fit --config configs/digits.yaml --model.loss own_loss.SupCon --model.loss.temperature 0.2

It performs no communication: SimOModule gathers the embeddings of all processes first, with gradient, as the check
shows. It took 17 s on two cores of an AMD EPYC.
"""

import argparse

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from simo_lightning import DigitsPairDataModule, ImageEncoder, SimOModule
from simo_lightning.callbacks import GeometryMonitor, OnlineKNN
from simo_lightning.testing import check_gradient_parity


class SupCon(nn.Module):
    """Cross-entropy between each embedding's similarities to all others and those of its own class.

    Args:
        temperature: Temperature of the softmax, > 0.

    Source:
        Khosla et al., arXiv 2004.11362, Eq. 2.
    """

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            embeddings: ``(N, D)``.
            labels: ``(N,)``.

        Returns:
            Scalar.
        """
        embeddings = nn.functional.normalize(embeddings, dim=1)
        diagonal = torch.eye(len(embeddings), dtype=torch.bool, device=embeddings.device)
        logits = (embeddings @ embeddings.T / self.temperature).masked_fill(diagonal, -1e9)  # (N, N)
        positive = (labels[:, None] == labels) & ~diagonal
        log_probabilities = logits.log_softmax(dim=1).masked_fill(~positive, 0.0)
        return -(log_probabilities.sum(1) / positive.sum(1).clamp(min=1)).mean()


def main(processes: int, epochs: int) -> None:
    """Check the loss, then train with it.

    Args:
        processes: Number of processes of the check.
        epochs: Number of training epochs.
    """
    check_gradient_parity(SupCon(), world_size=processes)
    pl.seed_everything(0)
    module = SimOModule(ImageEncoder("resnet10", width=0.125, stem="small", in_channels=1), SupCon())
    data = DigitsPairDataModule(samples_per_class=10)
    callbacks = [OnlineKNN(), GeometryMonitor()]
    trainer = pl.Trainer(max_epochs=epochs, accelerator="cpu", logger=False, callbacks=callbacks, log_every_n_steps=1)
    trainer.fit(module, datamodule=data)
    print({name: round(float(value), 3) for name, value in trainer.callback_metrics.items()})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="one process in the check, and one epoch")
    tiny = parser.parse_args().tiny
    main(processes=1 if tiny else 2, epochs=1 if tiny else 10)
