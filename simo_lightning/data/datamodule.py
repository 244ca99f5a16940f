"""The data module that every data set shares: splits, balanced batches, augmentation on the device."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from simo_lightning.data.augment import BatchAugment, normalize
from simo_lightning.data.labels import Relabelled, coarse_index, index_by_name, present_classes
from simo_lightning.data.loader import (
    ResumableLoader,
    TrainingBatch,
    default_workers,
    keep_batch,
    leave_signals_to_the_trainer,
    silence_inapplicable_warnings,
)
from simo_lightning.data.photo_augment import PhotoAugment
from simo_lightning.data.pictures import Augment, AugmentedPictures, check_augment
from simo_lightning.data.sampler import ClassBalancedSampler, EvaluationSampler, evaluation_batch_size
from simo_lightning.data.sources import (
    ImageSource,
    Split,
    channel_statistics,
    in_memory,
    stratified_split,
    stratified_subset,
)
from simo_lightning.lightning_private import batches_processed
from simo_lightning.preprocessing import Preprocessing

Batch = tuple[Tensor, Tensor]
SMALL = 64  # pixels; larger images are photographs, which "auto" augments one by one


class PairDataModule(LightningDataModule):
    """Balanced training batches of labelled images, and batches in a fixed order for evaluation.

    A subclass adds a data set by one method, ``load(split)``. A training batch on the device is ``(images, labels)`` of
    P classes x K images x V views, normalised, the views of an image adjacent. Order and augmentation depend only on
    ``seed``, the epoch and the index of the batch, so that a resumed run draws the same batches.

    Args:
        classes_per_batch: P, number of classes in a training batch of each rank.
        samples_per_class: K, number of images of each class; at least 2, at most the size of the smallest class.
        views: V, number of augmented copies of each image.
        val_fraction: Share of each training class held out for validation, in [0, 1); 0: no validation. Not used if the
            data set has its own validation split.
        split_seed: Seed of that split and of the bank's subset, separate from ``seed`` so that runs with several seeds
            use the same split.
        seed: Seed of batches and augmentation; the same config and seeds give the same weights.
        augment: Augmentation of the training images. ``BatchAugment``: whole batches on their device, for small images
            in memory. ``PhotoAugment`` or any callable on one picture, such as those of torchvision.transforms.v2: each
            picture on its own, whole and before it is resized, in the workers. auto: ``PhotoAugment()`` if images are
            larger than 64 pixels, else ``BatchAugment()``. null: none.
        mean: Mean of each channel, on the scale 0..1; null: computed from the training images.
        std: Standard deviation of each channel on the same scale; null: computed from the training images.
        eval_batch_size: Images in an evaluation batch of each rank; a nearby size is used if the ranks would otherwise
            have different numbers of batches.
        num_workers: Processes that read batches, for each loader. null: none for images in memory; one for each core,
            at most 16 and divided among the processes of a node, where images are read from disk or augmented one by
            one.
        coarse: Coarse classes to train on, each with the classes that it joins, such as
            {animal: [cat, dog], vehicle: [ship, truck]}. Validation, test and bank keep the true classes.

    Attributes:
        class_names: Name of each true class, after ``setup``: those of training, then those that only other splits
            have. Labels of validation, test, gallery and bank are indices into it. Loading a further split may append
            to it.
        train_class_names: Names of the classes of training, the true or the coarse ones, after ``setup``.

    Raises:
        ValueError: If an argument is out of range, or only one of ``mean`` and ``std`` is given; in ``setup`` also if a
            class has fewer than ``samples_per_class`` images.

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
        augment: Augment | Literal["auto"] | None = BatchAugment(),  # noqa: B008  # immutable
        mean: list[float] | None = None,
        std: list[float] | None = None,
        eval_batch_size: int = 500,
        num_workers: int | None = None,
        coarse: dict[str, list[str]] | None = None,
    ) -> None:
        super().__init__()
        for name, value in {"views": views, "eval_batch_size": eval_batch_size}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        check_augment(augment)
        for name, value in {"num_workers": num_workers or 0, "seed": seed, "split_seed": split_seed}.items():
            if value < 0:
                raise ValueError(f"{name} must be non-negative, got {value}")
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction must lie in [0, 1), got {val_fraction}")
        if (mean is None) != (std is None):
            raise ValueError(f"mean and std must be given both or neither, got {mean} and {std}")
        if std is not None and min(std) <= 0:
            raise ValueError(f"std must be positive, got {std}")
        self.classes_per_batch = classes_per_batch
        self.samples_per_class = samples_per_class
        self.views = views
        self.val_fraction = val_fraction
        self.split_seed = split_seed
        self.seed = seed
        self.augment = augment
        self.mean = mean
        self.std = std
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.coarse = coarse
        self._prepared: dict[Split, ImageSource | None] = {}  # loaded by prepare_data and not yet used by setup
        self._splits: dict[Split, ImageSource | None] = {}  # with labels that index class_names
        self._training: ImageSource  # training images with the labels used in training, after setup
        self._bank: ImageSource  # labelled training images with their true labels, after setup
        self._train_loader: ResumableLoader | None = None
        self._resume: dict[str, int] | None = None

    extra_splits: tuple[Split, ...] = ()
    """Which of the splits "query", "gallery" and "unknown" the data set has; ``load`` is asked for no others."""

    def load(self, split: Split) -> ImageSource | None:
        """Read one split; the one method that a data set must define.

        Args:
            split: "train", "val" or "test", or one of ``extra_splits``: "query" and "gallery", which serve as test
                images and the images to find, or "unknown", images of no class of training.

        Returns:
            ``LabelledImages``, or any other ``ImageSource``; None if the data set has no such split; validation
            images are then held out from the training images. Splits may have different classes, in any order: they are
            matched by name.
        """
        raise NotImplementedError(f"{type(self).__name__} must define load(split), which reads its images")

    def prepare_data(self) -> None:
        """Download, decode and cache on one process, before the others read: the splits that the run needs."""
        fit = self.trainer is not None and self.trainer.state.fn in ("fit", "validate")
        for split in self._needed("fit" if fit else None):
            if split not in self._splits:
                self._prepared[split] = self.load(split)

    def _needed(self, stage: str | None) -> list[Split]:
        """Splits to load for a stage, in the order in which they are loaded."""
        needed: list[Split] = ["train", "val"]
        if stage in ("test", "predict", None):
            needed += ["query" if "query" in self.extra_splits else "test"]
            needed += ["gallery"] if "gallery" in self.extra_splits else []
        return needed + (["unknown"] if "unknown" in self.extra_splits else [])

    def setup(self, stage: str | None = None) -> None:
        """Load the training split and the other splits that ``stage`` needs, each once."""
        overfit = getattr(self.trainer, "overfit_batches", 0)
        if overfit:
            raise ValueError(
                f"overfit_batches must be 0, got {overfit}: Lightning then replaces the balanced sampler by a "
                "sequential one; use limit_train_batches instead"
            )
        if "train" not in self._splits:
            self._setup_training()
        for split in self._needed(stage):
            kept: Split = "test" if split == "query" else split
            if kept not in self._splits:
                source = self._read(split)
                self._splits[kept] = source if split == "unknown" else self._with_known_names(split, source)
        evaluated = [source for source in self._splits.values() if source is not None]
        silence_inapplicable_warnings(
            training=self._workers(self._training, training=True) == 0,
            evaluation=not any(self._workers(source) for source in evaluated),
            validation=self._splits["val"] is not None,
        )

    def _read(self, split: Split) -> ImageSource | None:
        return self._prepared.pop(split) if split in self._prepared else self.load(split)

    def _setup_training(self) -> None:
        train, val = self._read("train"), self._read("val")
        if train is None:
            raise ValueError(f"{type(self).__name__}.load('train') must return images, got None")
        self.class_names = list(train.class_names)
        if val is None and self.val_fraction > 0:
            kept, held = stratified_split(train.labels, self.val_fraction, self.split_seed)
            train, val = train.subset(kept), train.subset(held)
        val = self._with_known_names("val", val)
        self._label_training(train)
        self.train_class_names = list(self._training.class_names)
        _check_smallest_class(self._training, self.samples_per_class)
        if self.mean is None or self.std is None:
            self.mean, self.std = channel_statistics(train, self.split_seed)
        self._splits["train"], self._splits["val"] = train, val

    def _with_known_names(self, split: str, source: ImageSource | None) -> ImageSource | None:
        """The images of a split with labels that index ``class_names``, to which its further classes are added."""
        if source is None:
            return None
        known = set(self.class_names)
        self.class_names = self.class_names + [name for name in present_classes(source) if name not in known]
        return index_by_name(source, self.class_names)

    @property
    def num_classes(self) -> int:
        """Number of true classes."""
        return len(self.class_names)

    @property
    def num_train_classes(self) -> int:
        """Number of classes of training, true or coarse; labels of training batches are below it."""
        return len(self.train_class_names)

    @property
    def unseen_class_names(self) -> list[str]:
        """Names of the classes of validation and test of which training has no image."""
        seen = set(present_classes(self._bank))
        found = {name for split in ("val", "test") for name in self._present(split)}
        return [name for name in self.class_names if name in found - seen]

    def _present(self, split: Split) -> list[str]:
        source = self._splits.get(split)
        return [] if source is None else [self.class_names[label] for label in source.labels.unique().tolist()]

    def _label_training(self, train: ImageSource) -> None:
        """Set ``_training`` and ``_bank``."""
        self._training = self._bank = train
        if self.coarse is not None:
            labels = coarse_index(train.class_names, self.coarse)[train.labels]
            self._training = Relabelled(train, labels, list(self.coarse))

    def _train_sampler(self) -> ClassBalancedSampler:
        batch = (self.classes_per_batch, self.samples_per_class)
        return ClassBalancedSampler(self._training.labels, *batch, self.seed, self.rank, self.world_size)

    def _need(self, split: Split) -> ImageSource:
        if not self._splits:
            raise RuntimeError(f"{type(self).__name__}.setup() must run before a loader is made")
        source = self._splits.get(split)
        if source is None:
            hint = "set val_fraction above 0" if split == "val" else "use validation"
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
        """Batches of P x K raw images of this rank; a checkpoint holds the position in the epoch."""
        self._need("train")
        processed = None if self.trainer is None else self._batches_processed
        images: ImageSource | AugmentedPictures = self._training
        augment = self._augmentation()
        if augment is not None and not isinstance(augment, BatchAugment):
            images = AugmentedPictures(self._training, augment, self._image_preprocessing(), self.views)
        arguments = self._loader_arguments(self._workers(self._training, training=True))
        self._train_loader = ResumableLoader(images, self._train_sampler(), processed, **arguments)
        if self._resume is not None and self.trainer is not None and self.trainer.ckpt_path:
            self._train_loader.load_state_dict(self._resume)
        self._resume = None
        return self._train_loader

    def _augmentation(self) -> Augment | None:
        """``augment``, chosen by the size of the images where it is "auto"."""
        if self.augment != "auto":
            return self.augment
        return PhotoAugment() if max(self._image_preprocessing().size) > SMALL else BatchAugment()

    def _image_preprocessing(self) -> Preprocessing:
        """Size and channels of the images."""
        source: Any = self._training
        while hasattr(source, "source"):
            source = source.source
        if hasattr(source, "decoder"):
            decoder: Preprocessing = source.decoder
            return decoder
        channels, height, width = source.__getitems__([0])[0].shape[1:]
        return Preprocessing((height, width), channels=channels)

    def _workers(self, source: ImageSource, training: bool = False) -> int:
        """Number of processes that read the images of a source."""
        if self.num_workers is not None:
            return self.num_workers
        one_by_one = training and not isinstance(self._augmentation(), BatchAugment | None)
        return default_workers(self.trainer) if one_by_one or not in_memory(source) else 0

    def state_dict(self) -> dict[str, Any]:
        """The training loader's position.

        Lightning's own copy is lost if a schedule reads ``trainer.estimated_stepping_batches`` before the restore.
        """
        return {} if self._train_loader is None else {"train_loader": self._train_loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the position for the training loader, which is created later."""
        self._resume = state_dict.get("train_loader")

    def _batches_processed(self) -> int:
        assert self.trainer is not None
        return batches_processed(self.trainer)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """This rank's share of the validation split; no loader if ``val_fraction`` is 0."""
        if self._splits and self._splits["val"] is None:
            return []
        return self._evaluation_loader(self._need("val"))

    def test_dataloader(self) -> DataLoader:
        """This rank's share of the test split."""
        return self._evaluation_loader(self._need("test"))

    def predict_dataloader(self) -> DataLoader:
        """This rank's share of the test split, or of the validation split if there is no test split."""
        return self._evaluation_loader(self._need("val" if self._splits.get("test") is None else "test"))

    def bank_dataloader(
        self, limit: int | None = None, rank: int | None = None, world_size: int | None = None
    ) -> DataLoader:
        """Raw training images with their true labels, each once in a fixed order: the bank of kNN and probes.

        Images with a hidden label are left out.

        Args:
            limit: Number of images over all ranks, the classes in proportion, drawn by ``split_seed``; None: all.
            rank: Rank whose share is returned; None: this process.
            world_size: Number of shares; None: the number of processes.

        Returns:
            Loader of uint8 batches for ``prepare(batch, augment=False)``.
        """
        self._need("train")
        bank = self._bank
        if limit is not None and limit < len(bank):
            bank = bank.subset(stratified_subset(bank.labels, limit, self.split_seed))
        return self._evaluation_loader(bank, rank, world_size)

    def gallery_dataloader(self) -> DataLoader | None:
        """This rank's share of the gallery, the raw images that those of the test split are to find; None without one.

        Returns:
            Loader of uint8 batches for ``prepare(batch, augment=False)``.
        """
        gallery = self._splits.get("gallery")
        return None if gallery is None else self._evaluation_loader(gallery)

    def unknown_dataloader(self) -> DataLoader | None:
        """This rank's share of the raw images that belong to no class of training; None if there are none.

        Returns:
            Loader of uint8 batches for ``prepare(batch, augment=False)``.
        """
        unknown = self._splits.get("unknown")
        return None if unknown is None else self._evaluation_loader(unknown)

    def _evaluation_loader(self, source: ImageSource, rank: int | None = None, world: int | None = None) -> DataLoader:
        rank, world = self.rank if rank is None else rank, self.world_size if world is None else world
        return DataLoader(
            source,  # type: ignore[arg-type]
            batch_size=evaluation_batch_size(len(source), world, self.eval_batch_size),
            sampler=EvaluationSampler(len(source), rank, world),
            collate_fn=keep_batch,
            **self._loader_arguments(self._workers(source)),
        )

    def _loader_arguments(self, workers: int) -> dict[str, Any]:
        return {
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "worker_init_fn": leave_signals_to_the_trainer,
            "pin_memory": self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
        }

    def on_after_batch_transfer(self, batch: Batch | TrainingBatch, dataloader_idx: int) -> Batch:
        """Prepare a batch on its device: augmented in training, otherwise only normalised."""
        return self.prepare(batch, augment=self.trainer is not None and self.trainer.training)

    def prepare(self, batch: Batch | TrainingBatch, augment: bool) -> Batch:
        """Raw images as the encoder expects them.

        Args:
            batch: uint8 images ``(N, C, H, W)`` and labels ``(N,)`` on any device; a training batch also has the seed
                of its augmentation, which determines it. Images ``(N, V, C, H, W)`` are V views that the loader has
                augmented.
            augment: Whether to make V augmented views of each image, unless the loader has made them.

        Returns:
            float32 images ``(N * V, C, H, W)``, normalised by ``mean`` and ``std``, and labels ``(N * V,)``; V is 1 if
            ``augment`` is False.

        Raises:
            ValueError: If a batch without a seed is to be augmented.
        """
        images, labels, *draw = batch
        if images.ndim == 5:
            images, labels = images.flatten(0, 1), labels.repeat_interleave(images.shape[1], 0)
        elif augment:
            images, labels = self._augmented(images, labels, *draw)
        if self.mean is None or self.std is None:
            raise RuntimeError(f"{type(self).__name__}.setup() must run before a batch is prepared")
        return normalize(images, tuple(self.mean), tuple(self.std)), labels

    def _augmented(self, images: Tensor, labels: Tensor, draw: int | None = None) -> Batch:
        """V views of each image, augmented as a batch."""
        images, labels = images.repeat_interleave(self.views, 0), labels.repeat_interleave(self.views, 0)
        augment = self._augmentation()
        if augment is None:
            return images, labels
        if draw is None:
            raise ValueError(
                "batch must be (images, labels, draw) to be augmented, got no draw (seed of the augmentation)"
            )
        if not isinstance(augment, BatchAugment):
            raise ValueError(
                f"images must come from train_dataloader(), where {type(augment).__name__} augments each picture, "
                f"got a batch of shape {tuple(images.shape)}"
            )
        return augment(images, torch.Generator(images.device).manual_seed(draw)), labels


def _check_smallest_class(train: ImageSource, samples_per_class: int) -> None:
    """Raise ValueError, naming the class, if a class has fewer labelled training images than a batch takes of it."""
    known = train.labels[train.labels < len(train.class_names)]
    counts = torch.bincount(known, minlength=len(train.class_names))
    smallest = int(counts.argmin())
    if counts[smallest] < samples_per_class:
        images = "images" if len(known) == len(train.labels) else "labelled images"
        raise ValueError(
            f"samples_per_class must not exceed the smallest class of the training split: "
            f"{train.class_names[smallest]!r} has {counts[smallest]} {images}, got {samples_per_class}"
        )
