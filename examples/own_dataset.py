"""Another data set is a subclass with one method: here images in an .npz file, which this program writes.

    python examples/own_dataset.py

On the command line, give its class path, in the folder of this file:

    simo fit --config configs/digits.yaml --data own_dataset.NpzPairDataModule --data.path shapes.npz

It took 9 s on two cores of an AMD EPYC.
"""

import argparse
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from simo_lightning import ImageEncoder, PairDataModule, SimOModule
from simo_lightning.callbacks import GeometryMonitor, OnlineKNN
from simo_lightning.data import ImageSource, LabelledImages
from simo_lightning.testing import check_batch_composition


class NpzPairDataModule(PairDataModule):
    """Images of an .npz file with the arrays ``images`` (N, H, W, C) uint8, ``labels`` (N,) and ``class_names`` (C,).

    Args:
        path: The file.
        **kwargs: Arguments of ``PairDataModule``.
    """

    def __init__(self, path: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.path = path

    def load(self, split: str) -> ImageSource | None:
        """The training images; the data set has no other split, so a tenth of them is held out for validation."""
        if split != "train":
            return None
        with np.load(Path(self.path).expanduser()) as file:
            images = torch.from_numpy(file["images"]).permute(0, 3, 1, 2)  # (N, H, W, C) to (N, C, H, W)
            return LabelledImages(images, torch.from_numpy(file["labels"]).long(), file["class_names"].tolist())


def write_shapes(path: str, count: int) -> None:
    """Noisy pictures of horizontal bars, vertical bars and crosses, in equal numbers.

    Args:
        path: File to write.
        count: Pictures of each class.
    """
    random = np.random.default_rng(0)
    labels = np.arange(3 * count) % 3
    images = random.integers(0, 120, (3 * count, 16, 16, 3))
    for image, label, start in zip(images, labels, random.integers(2, 12, 3 * count), strict=True):
        if label in (0, 2):
            image[start : start + 3] += 120
        if label in (1, 2):
            image[:, start : start + 3] += 120
    np.savez(path, images=images.clip(0, 255).astype(np.uint8), labels=labels, class_names=["bar", "pole", "cross"])


def main(count: int, epochs: int) -> None:
    """Write the file, check the batches, train.

    Args:
        count: Pictures of each class.
        epochs: Number of training epochs.
    """
    write_shapes("shapes.npz", count)
    data = NpzPairDataModule("shapes.npz", classes_per_batch=3, samples_per_class=16)
    check_batch_composition(data)
    pl.seed_everything(0)
    module = SimOModule(ImageEncoder("resnet10", width=0.125, stem="small", embedding_dim=8))
    callbacks = [OnlineKNN(), GeometryMonitor()]
    trainer = pl.Trainer(max_epochs=epochs, accelerator="cpu", logger=False, callbacks=callbacks, log_every_n_steps=1)
    trainer.fit(module, datamodule=data)
    print({name: round(float(value), 3) for name, value in trainer.callback_metrics.items()})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="fewer pictures and one epoch")
    tiny = parser.parse_args().tiny
    main(count=40 if tiny else 400, epochs=1 if tiny else 5)
