"""The data module that every data set shares: splits, balanced batches, augmentation on the device."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from simo_lightning.data.arguments import check_arguments, check_trainer, unlabelled_images
from simo_lightning.data.augment import BatchAugment, normalize
from simo_lightning.data.labels import TrainingLabels, check_smallest_class, training_labels
from simo_lightning.data.loader import (
    ResumableLoader,
    evaluation_loader,
    hush_lightning,
    loader_arguments,
    mixed_seed,
)
from simo_lightning.data.semi import balanced_sampler
from simo_lightning.data.sources import (
    ImageSource,
    channel_statistics,
    check_same_classes,
    stratified_split,
    stratified_subset,
)

Split = Literal["train", "val", "test"]
Batch = tuple[Tensor, Tensor]


class PairDataModule(LightningDataModule):
    """Balanced training batches of any labelled images, and plain ones for evaluation.

    A subclass brings another data set by one method, ``load(split)``. A training batch is ``(images, labels)`` of P
    classes x K images x V views, normalised, the views of an image adjacent; what is drawn for it depends on ``seed``,
    the epoch and the batch's number alone, so that a resumed run draws the same.

    With ``label_fraction`` below 1 the other labels are hidden: the same ones on every rank and in every run. A batch
    then holds U unlabelled images more, each a class of its own with a label outside of ``0..num_classes - 1``; see
    ``SemiBalancedSampler`` for what an epoch is. The bank holds the labelled images alone.

    Args:
        classes_per_batch: P, different classes of a training batch on each rank.
        samples_per_class: K, different images of each class; at least 2, at most the smallest class.
        views: V, augmented copies of each image; at least 2 with unlabelled images, whose views are all they have.
        val_fraction: Share of each training class held out as validation split, in [0, 1); 0 = no validation. Not used
            by a data set that has a validation split of its own.
        split_seed: Seed of that split, of the labels kept and of the bank's subset, apart from ``seed`` so that seeds
            compare on one split.
        seed: Seed of batches and augmentation; with the same config, and the model's seed, it gives the same weights.
        augment: Augmentation of the training batches; null = none.
        mean: Mean of each channel, on the scale 0..1; null = computed from the training images.
        std: Standard deviation of each channel on the same scale; null = computed from the training images.
        eval_batch_size: Images of a batch of evaluation on each rank; near it where ranks would differ in batches.
        num_workers: Processes that read batches; 0 is best for images in memory.
        label_fraction: Share of each training class that keeps its label, in (0, 1]; drawn by ``split_seed``.
        unlabelled_per_batch: U, unlabelled images of a training batch on each rank where labels are hidden; 0 = train
            on the labelled part alone, as a head must; null = as many as labelled ones, P x K.
        coarse: Train on coarse classes: the classes that each joins, such as
            {animal: [cat, dog], vehicle: [ship, truck]}. Validation, test and bank keep the true classes.

    Attributes:
        class_names: Name of each true class, after ``setup``.
        num_classes: Their number, after ``setup``.
        train_class_names: Names of the classes of training: the true or the coarse ones, after ``setup``.

    Example:
        >>> from simo_lightning.data import LabelledImages
        >>> class Noise(PairDataModule):
        ...     def load(self, split):
        ...         if split == "train":
        ...             images = torch.randint(256, (60, 3, 32, 32), dtype=torch.uint8)
        ...             return LabelledImages(images, torch.arange(60) % 3, ["a", "b", "c"])
        >>> data = Noise(classes_per_batch=3, samples_per_class=4)
        >>> data.setup("fit")
        >>> images, labels = data.prepare(next(iter(data.train_dataloader())), augment=True)
        >>> images.shape, labels.bincount()
        (torch.Size([12, 3, 32, 32]), tensor([4, 4, 4]))
    """

    def __init__(
        self,
        classes_per_batch: int = 10,
        samples_per_class: int = 25,
        views: int = 1,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        seed: int = 0,
        augment: BatchAugment | None = BatchAugment(),  # noqa: B008  # immutable
        mean: list[float] | None = None,
        std: list[float] | None = None,
        eval_batch_size: int = 500,
        num_workers: int = 0,
        label_fraction: float = 1.0,
        unlabelled_per_batch: int | None = None,
        coarse: dict[str, list[str]] | None = None,
    ) -> None:
        super().__init__()
        self.classes_per_batch = classes_per_batch
        self.samples_per_class = samples_per_class
        self.views = views
        self.label_fraction = label_fraction
        self.unlabelled_per_batch = unlabelled_per_batch
        self.coarse = coarse
        self.val_fraction = val_fraction
        self.split_seed = split_seed
        self.seed = seed
        self.augment = augment
        self.mean = mean
        self.std = std
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        check_arguments(vars(self))
        self._prepared: dict[Split, ImageSource | None] = {}  # read by prepare_data, until setup takes it
        self._splits: dict[Split, ImageSource | None] = {}
        self._training: TrainingLabels | None = None
        self._train_loader: ResumableLoader | None = None
        self._resume: dict[str, int] | None = None

    def load(self, split: Split) -> ImageSource | None:
        """Read one split; the one method that another data set must bring.

        Args:
            split: "train", "val" or "test".

        Returns:
            ``LabelledImages``, or any other ``ImageSource``; ``None`` where the data set has no such split (the
            validation split is then cut from the training images).
        """
        raise NotImplementedError(f"{type(self).__name__} must define load(split), which reads its images")

    def prepare_data(self) -> None:
        """Download, decode and cache on one process, before the others read."""
        splits: tuple[Split, ...] = ("train", "val", "test")
        for split in splits:
            self._prepared[split] = self.load(split)

    def setup(self, stage: str | None = None) -> None:
        """Read the splits that ``stage`` needs and that are not there yet; the training split always."""
        check_trainer(self.trainer)
        if "train" not in self._splits:
            self._setup_training()
        if stage in ("test", "predict", None) and "test" not in self._splits:
            self._splits["test"] = self._read("test")
            check_same_classes("test", self._splits["test"], self.class_names)
        hush_lightning(self._splits["train"], self._splits["val"], self.num_workers)

    def _read(self, split: Split) -> ImageSource | None:
        return self._prepared.pop(split) if split in self._prepared else self.load(split)

    def _setup_training(self) -> None:
        train, val = self._read("train"), self._read("val")
        if train is None:
            raise ValueError(f"{type(self).__name__}.load('train') must give images, got None")
        self.class_names = list(train.class_names)
        self.num_classes = len(self.class_names)
        if val is None and self.val_fraction > 0:
            kept, held = stratified_split(train.labels, self.val_fraction, self.split_seed)
            train, val = train.subset(kept), train.subset(held)
        check_same_classes("val", val, self.class_names)
        self._label(train)
        if self.mean is None or self.std is None:
            self.mean, self.std = channel_statistics(train, self.split_seed)
        self._splits["train"], self._splits["val"] = train, val

    def _label(self, train: ImageSource) -> None:
        hidden_too = unlabelled_images(vars(self)) > 0
        self._training = training_labels(train, self.label_fraction, self.coarse, self.split_seed, hidden_too)
        self.train_class_names = list(self._training.train.class_names)
        check_smallest_class(self._training.train, self.samples_per_class)

    def _need(self, split: Split) -> ImageSource:
        if not self._splits:
            raise RuntimeError(f"{type(self).__name__}.setup() must run before a loader is asked for")
        source = self._splits.get(split)
        if source is None:
            hint = "set val_fraction above 0" if split == "val" else "bring one, or use validation"
            raise ValueError(f"{type(self).__name__} has no {split} split: {hint}")
        return source

    @property
    def rank(self) -> int:
        """This process among all, 0 without a trainer."""
        return 0 if self.trainer is None else self.trainer.global_rank

    @property
    def world_size(self) -> int:
        """Number of processes, 1 without a trainer."""
        return 1 if self.trainer is None else self.trainer.world_size

    def train_dataloader(self) -> ResumableLoader:
        """Batches of P x K raw training images of this rank, and U more, with their place in a checkpoint."""
        self._need("train")
        assert self._training is not None
        sampler = balanced_sampler(
            *(self._training.train.labels, self._training.labelled),
            *(self.classes_per_batch, self.samples_per_class, unlabelled_images(vars(self))),
            *(self.seed, self.rank, self.world_size),
        )
        processed = None if self.trainer is None else self._batches_processed
        self._train_loader = ResumableLoader(self._training.train, sampler, processed, **self._loader_arguments())
        if self._resume is not None and self.trainer is not None and self.trainer.ckpt_path:
            self._train_loader.load_state_dict(self._resume)
        self._resume = None
        return self._train_loader

    def state_dict(self) -> dict[str, Any]:
        """The training loader's place.

        Lightning's own copy is lost where a schedule asks for ``trainer.estimated_stepping_batches`` before a restore.
        """
        return {} if self._train_loader is None else {"train_loader": self._train_loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the place for the training loader, which is made later."""
        self._resume = state_dict.get("train_loader")

    def _batches_processed(self) -> int:
        assert self.trainer is not None
        return self.trainer.fit_loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """This rank's share of the validation split; no loader where ``val_fraction`` is 0."""
        if self._splits and self._splits["val"] is None:
            return []
        return self._evaluation_loader(self._need("val"))

    def test_dataloader(self) -> DataLoader:
        """This rank's share of the test split."""
        return self._evaluation_loader(self._need("test"))

    def predict_dataloader(self) -> DataLoader:
        """This rank's share of the test split, or of the validation split where there is no test."""
        return self._evaluation_loader(self._need("val" if self._splits.get("test") is None else "test"))

    def bank_dataloader(
        self, limit: int | None = None, rank: int | None = None, world_size: int | None = None
    ) -> DataLoader:
        """Raw labelled training images in a fixed order, none twice: what a kNN classifier or a probe compares with.

        Under their true classes; those whose label is hidden are left out.

        Args:
            limit: Images over all ranks, the classes in proportion, drawn by ``split_seed``; ``None`` = all.
            rank: Whose share; ``None`` = this process's.
            world_size: Number of shares; ``None`` = of processes.

        Returns:
            Loader of uint8 batches for ``prepare(batch, augment=False)``.
        """
        self._need("train")
        assert self._training is not None
        bank = self._training.bank
        if limit is not None and limit < len(bank):
            bank = bank.subset(stratified_subset(bank.labels, limit, self.split_seed))
        return self._evaluation_loader(bank, rank, world_size)

    def _evaluation_loader(self, source: ImageSource, rank: int | None = None, world: int | None = None) -> DataLoader:
        rank, world = self.rank if rank is None else rank, self.world_size if world is None else world
        return evaluation_loader(source, rank, world, self.eval_batch_size, **self._loader_arguments())

    def _loader_arguments(self) -> dict[str, Any]:
        device = "cpu" if self.trainer is None else self.trainer.strategy.root_device.type
        return loader_arguments(self.num_workers, pin_memory=device == "cuda")

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Prepare a batch on its device: augmented in training, else only normalised."""
        return self.prepare(batch, augment=self.trainer is not None and self.trainer.training)

    def prepare(self, batch: Batch, augment: bool) -> Batch:
        """Raw images as the encoder takes them.

        Args:
            batch: uint8 images ``(N, C, H, W)`` and labels ``(N,)`` on any device.
            augment: Whether it is a training batch: V views of each image, augmented by the draws of the batch that
                the training loader gave last.

        Returns:
            float32 images ``(N * V, C, H, W)``, of mean 0 and standard deviation 1 over the training images, and labels
            ``(N * V,)``; V is 1 where ``augment`` is False.
        """
        images, labels = batch
        if augment:
            images, labels = images.repeat_interleave(self.views, 0), labels.repeat_interleave(self.views, 0)
            if self.augment is not None:
                images = self.augment(images, self._generator(images.device))
        if self.mean is None or self.std is None:
            raise RuntimeError(f"{type(self).__name__}.setup() must run before a batch is prepared")
        return normalize(images, tuple(self.mean), tuple(self.std)), labels

    def _generator(self, device: torch.device) -> torch.Generator:
        """The generator of the augmentation of the batch last given."""
        loader = self._train_loader
        drawn = mixed_seed(self.seed, 0, 0) if loader is None else loader.draw_seed(self.seed)
        return torch.Generator(device).manual_seed(drawn)
