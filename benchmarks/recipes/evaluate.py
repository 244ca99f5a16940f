"""How every recipe is judged: the encoder as the last epoch left it, on images it has not seen."""

import zlib
from functools import partial
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import seed_everything
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.optim import AdamW
from torch.utils.data import DataLoader

from simo_lightning import OneCycle, PairDataModule, ProbeModule, SimOModule
from simo_lightning.functional.geometry import class_cosine, class_cosine_max, effective_rank, scatter_ratio
from simo_lightning.functional.knn import knn_accuracy
from simo_lightning.functional.moments import class_moments

NEIGHBORS = (1, 20, 200)
HEAD_RATE = 4e-3
LINEAR_STEPS = 1000
# Lightning's own prints, files and bars: a run has its JSON file and nothing else.
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


class Embedded(NamedTuple):
    """A split as the encoder sees it.

    Attributes:
        embeddings: ``(N, D)`` on the CPU, as the encoder gives them.
        labels: ``(N,)``.
        checksum: CRC-32 of the raw images and labels.
    """

    embeddings: Tensor
    labels: Tensor
    checksum: int


@torch.no_grad()
def embed(trainer: pl.Trainer, module: SimOModule, data: PairDataModule, loader: DataLoader) -> Embedded:
    """Embed a split without augmentation, in the trainer's precision, as ``val/knn`` does.

    Args:
        trainer: That trained the module.
        module: In evaluation mode, on the trainer's device.
        data: Prepares the images.
        loader: Of raw images.

    Returns:
        The embedded split.
    """
    precision, checksum = trainer.precision_plugin, 0
    embeddings, labels = [], []
    for batch in loader:
        for part in batch:
            checksum = zlib.crc32(part.contiguous().numpy().tobytes(), checksum)
        images, kinds = data.prepare(move_data_to_device(batch, module.device), augment=False)
        with precision.forward_context():
            embeddings.append(module.embed(precision.convert_input(images)).cpu())
        labels.append(kinds.cpu())
    return Embedded(torch.cat(embeddings), torch.cat(labels), checksum)


def evaluate(trainer: pl.Trainer, module: SimOModule, data: PairDataModule, seed: int) -> dict[str, Any]:
    """All numbers of a run.

    Args:
        trainer: That trained the module.
        module: Trained; its encoder is frozen by this.
        data: With a validation and a test split.
        seed: Of the MLP head.

    Returns:
        ``metrics`` with the keys val and test, and ``data``: the splits' sizes and checksum.

    Raises:
        ValueError: If embeddings are not finite, or a split is missing.
    """
    data.setup("test")
    module.to(trainer.strategy.root_device).eval()
    see = partial(embed, trainer, module, data)
    bank, test = see(data.bank_dataloader()), see(data.test_dataloader())
    validation = data.val_dataloader()
    if isinstance(validation, list):
        raise ValueError("the data must have a validation split, for the learning rate: got val_fraction 0")
    val = see(validation)
    metrics = {
        "val": {"knn20": neighbors(bank, val, 20)},
        "test": {f"knn{k}": neighbors(bank, test, k) for k in NEIGHBORS}
        | geometry(test, data.num_classes)
        | {"linear": linear_probe(bank, test), "mlp": mlp_head(trainer, module, data, seed)},
    }
    checksum = zlib.crc32(f"{bank.checksum} {val.checksum} {test.checksum}".encode())
    sizes = {"train": len(bank.labels), "val": len(val.labels), "test": len(test.labels)}
    return {"metrics": metrics, "data": {**sizes, "checksum": f"{checksum:08x}"}}


def neighbors(bank: Embedded, queries: Embedded, k: int) -> float:
    """Accuracy of k nearest neighbours by cosine among all training images; nan where there are fewer than k."""
    if k > len(bank.labels):
        return float("nan")
    return float(knn_accuracy(queries.embeddings, queries.labels, bank.embeddings, bank.labels, k))


def geometry(split: Embedded, num_classes: int) -> dict[str, float]:
    """Mean and largest absolute cosine between class means, effective rank, within over between."""
    moments = class_moments(split.embeddings, split.labels, num_classes)
    functions = {
        "orthogonality": class_cosine,
        "orthogonality_max": class_cosine_max,
        "effective_rank": effective_rank,
        "within_between": scatter_ratio,
    }
    return {name: float(function(moments)) for name, function in functions.items()}


def linear_probe(bank: Embedded, queries: Embedded) -> float:
    """Accuracy of scikit-learn's logistic regression (C = 1) on embeddings standardised by the training images'."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=LINEAR_STEPS))
    probe.fit(bank.embeddings.double().numpy(), bank.labels.numpy())
    return float(probe.score(queries.embeddings.double().numpy(), queries.labels.numpy()))


def mlp_head(trainer: pl.Trainer, module: SimOModule, data: PairDataModule, seed: int) -> float:
    """Test accuracy of an MLP head trained for one epoch on the frozen encoder: the paper's protocol.

    nan where the training batches do not carry the classes that are judged: coarse classes, or hidden labels.
    """
    if data.train_class_names != data.class_names or getattr(data, "label_fraction", 1) < 1:
        return float("nan")
    seed_everything(seed, verbose=False)
    probe = ProbeModule(
        data.num_classes,
        encoder=module.encoder,
        head="mlp",
        optimizer=partial(AdamW, lr=HEAD_RATE),
        lr_scheduler=OneCycle,
    )
    judge = pl.Trainer(
        max_epochs=1,
        accelerator=module.device.type,
        devices=1,
        precision=trainer.precision,
        limit_val_batches=0,
        **QUIET,  # type: ignore[arg-type]
    )
    judge.fit(probe, datamodule=data)
    return float(judge.test(probe, datamodule=data, verbose=False)[0]["test/accuracy"])
