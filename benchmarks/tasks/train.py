"""One run of a task: trains an encoder and keeps the embeddings of all its images, from which all scores follow."""

import time
import warnings
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor
from torch.optim import AdamW

from benchmarks.machine import Row
from benchmarks.tasks.data import TaskImages
from simo_lightning import ImageEncoder, JointLoss, OneCycle, ProjectionHeadLoss, SimOModule
from simo_lightning.class_paths import import_class
from simo_lightning.data import BatchAugment, LabelledImages, TensorPairDataModule
from simo_lightning.functional import map_at_r
from simo_lightning.parameter_groups import ParameterGroups

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
POINTS = 5  # of the course of training, the last one at its end


class Course(pl.Callback):
    """MAP@R among the validation images at equal parts of training, and the seconds of training until then.

    Seconds are those of a GPU, or on a CPU those that the process computed, so that other processes do not count.
    """

    def __init__(self, images: LabelledImages, data: TensorPairDataModule) -> None:
        self.images, self.data = images, data
        self.points: list[tuple[float, float]] = []
        self._seconds, self._since = 0.0, 0.0

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._since = self._now()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        total = int(trainer.estimated_stepping_batches)
        if trainer.global_step in {round(total * part / POINTS) for part in range(1, POINTS + 1)}:
            self._seconds += self._now() - self._since
            # each image against all others, as the test images are judged: what every choice is made by
            score = map_at_r(embed(trainer, pl_module, self.data, self.images), self.images.labels)
            self.points.append((self._seconds, float(score)))
            self._since = self._now()


@torch.no_grad()
def embed(trainer: pl.Trainer, module: Any, data: TensorPairDataModule, images: LabelledImages) -> Tensor:
    """Embeddings ``(N, D)`` of images without augmentation, in the precision of training."""
    training, precision, parts = module.training, trainer.precision_plugin, []
    module.eval()
    for batch, labels in zip(images.images.split(500), images.labels.split(500), strict=True):
        on_device = (batch.to(module.device), labels.to(module.device))
        with precision.forward_context():
            parts.append(module.embed(data.prepare(on_device, augment=False)[0]).float().cpu())
    module.train(training)
    return torch.cat(parts)


def make_module(about: dict[str, Any], setting: dict[str, Any], rate: float) -> SimOModule:
    """The encoder with a loss: ``setting`` has the class path and arguments of the loss, a factor of its rate, and
    whether it sees the embeddings through a projection head.
    """
    loss = import_class(setting["class_path"], ("benchmarks",))(**setting["init_args"])
    dimension = setting.get("embedding_dim", about["embedding_dim"])
    projector: dict[str, Any] = {"embedding_dim": dimension}
    if setting.get("projection_head"):  # the embeddings are the features of the backbone
        loss, projector = ProjectionHeadLoss(loss, dimension), {"embedding_dim": None, "projector": "none"}
    encoder = ImageEncoder(image_size=about["image_size"], **projector, **about["encoder"])
    module = SimOModule(
        encoder,
        loss,
        optimizer=partial(AdamW, lr=rate),
        lr_scheduler=OneCycle,
        channels_last=True,
        parameter_groups=ParameterGroups(loss_lr_factor=setting.get("loss_lr_factor", 1.0)),
    )
    module.default_callbacks = False
    return module


def composition(
    about: dict[str, Any], setting: dict[str, Any], given: dict[str, Any], images: LabelledImages
) -> dict[str, int]:
    """Classes of a batch and images of each: those of the setting or the data set, with no more classes than there are.

    In a task that takes a part of the classes or of their images, a batch keeps about its number of images: with fewer
    classes it has more images of each, with fewer images of each more classes.
    """
    classes, samples = (setting.get(key, about[key]) for key in ("classes_per_batch", "samples_per_class"))
    size, available = classes * samples, len(images.class_names)
    if "number_of_classes" in given or "images_per_class" in given:
        smallest = int(torch.bincount(images.labels, minlength=available).min())
        classes = min(size // min(samples, smallest), available)
        samples = min(size // classes, smallest)
    return {"classes_per_batch": min(classes, available), "samples_per_class": samples}


def train(job: dict[str, Any], images: TaskImages) -> tuple[Row, dict[str, Any]]:
    """Train on the images of a task.

    Args:
        job: ``about`` the data set, ``setting`` of the loss, ``rate``, ``seed`` and ``accelerator``.
        images: Of the task.

    Returns:
        What the run measured, with ``error`` where it diverged; and the embeddings of each split by name, in float16,
        with a linear classifier's ``weight`` and ``bias`` where the loss is one.
    """
    rank_zero_only.rank = 1  # type: ignore[attr-defined]  # no lines about the machine
    warnings.filterwarnings("ignore")
    about, setting = job["about"], job["setting"]
    seed_everything(job["seed"], verbose=False)
    own = composition(about, setting, job["given"], images.train)
    data = TensorPairDataModule(
        images.train, val_fraction=0.0, seed=job["seed"], augment=BatchAugment(**about["augment"]), **own
    )
    # As many images as the epochs have, whatever the batches; an epoch of the sampler ends with the smallest class
    batch = own["classes_per_batch"] * own["samples_per_class"]
    steps = job["given"].get("steps", max(1, about["epochs"] * len(images.train) // batch))
    module, course = make_module(about, setting, job["rate"]), Course(images.val, data)
    trainer = pl.Trainer(
        max_epochs=-1,
        max_steps=steps,
        precision="bf16-mixed",
        accelerator=job["accelerator"],
        devices=1,
        limit_val_batches=0,
        callbacks=[course],
        **QUIET,  # type: ignore[arg-type]
    )
    start = time.perf_counter()
    try:
        trainer.fit(module, datamodule=data)
        if trainer.interrupted:  # Lightning ends like this on Ctrl-C, too
            raise KeyboardInterrupt
        module.to(trainer.strategy.root_device)
        splits = {name: split for name, split in images._asdict().items() if isinstance(split, LabelledImages)}
        found = {name: embed(trainer, module, data, split) for name, split in splits.items()}
        if not all(each.isfinite().all() for each in found.values()):
            raise ValueError("embeddings must be finite")
    except ValueError as error:
        if "finite" not in str(error):
            raise
        return {"error": "diverged", "seconds": time.perf_counter() - start}, {}
    row: Row = {"error": None, "seconds": time.perf_counter() - start, "steps": trainer.global_step}
    row |= {"val_map_at_r": course.points[-1][1], "course": " ".join(f"{s:.1f}:{v:.4f}" for s, v in course.points)}
    kept: dict[str, Any] = {name: each.half().numpy() for name, each in found.items()}
    # of a classifier behind a projection head nothing is kept, since it sees other embeddings
    head = module.loss.losses["classifier"] if isinstance(module.loss, JointLoss) else module.loss
    for name in ("weight", "bias"):
        if isinstance(getattr(head, name, None), Tensor):
            kept[name] = getattr(head, name).detach().float().cpu().numpy()
    return row, kept
