"""The data module that every data set shares: splits, balanced batches, augmentation on the device."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from simo_lightning.data.augment import BatchAugment
from simo_lightning.data.labels import Relabelled, coarse_index
from simo_lightning.data.loader import (
    ResumableLoader,
    TrainingBatch,
    keep_batch,
    leave_signals_to_the_trainer,
    silence_inapplicable_warnings,
)
from simo_lightning.data.preprocessing import Agreement, agree, read_alike, warn_of_stem
from simo_lightning.data.sampler import ClassBalancedSampler, EvaluationSampler, evaluation_batch_size
from simo_lightning.data.sources import (
    ImageSource,
    Split,
    channel_statistics,
    name_list,
    stratified_split,
    stratified_subset,
)
from simo_lightning.lightning_private import batches_processed
from simo_lightning.preprocessing import Preprocessing, takes_preprocessing

Batch = tuple[Tensor, Tensor]


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
        augment: Augmentation of the training batches; null: none.
        mean: Mean of each channel, on the scale 0..1; null: that of the model, or computed from the training images.
        std: Standard deviation of each channel on the same scale; with ``mean``.
        eval_batch_size: Images in an evaluation batch of each rank; a nearby size is used if the ranks would otherwise
            have different numbers of batches.
        num_workers: Processes that read batches; 0 is best for images in memory.
        coarse: Coarse classes to train on, each with the classes that it joins, such as
            {animal: [cat, dog], vehicle: [ship, truck]}. Validation, test and bank keep the true classes.

    The images are preprocessed as the model requires: a module with a ``preprocessing``, such as one from a checkpoint,
    determines size, channels, mean and std, and images in memory of another size are resized. Otherwise they follow
    from the arguments here, then from the encoder's ``preprocessing`` (pretrained weights), then from the training
    images; a fit gives the result to the module, whose checkpoints store it.

    Attributes:
        preprocessing: The preprocessing; mean and std are known after ``setup``.
        class_names: Name of each true class, after ``setup``.
        num_classes: Their number, after ``setup``.
        train_class_names: Names of the classes of training, the true or the coarse ones, after ``setup``.

    Raises:
        ValueError: If an argument is out of range, or only one of ``mean`` and ``std`` is given; in ``setup`` also if
            the images do not have the model's channels, an argument contradicts the model's preprocessing, a class has
            fewer than ``samples_per_class`` images, or the splits have different classes.

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
        coarse: dict[str, list[str]] | None = None,
    ) -> None:
        super().__init__()
        for name, value in {"views": views, "eval_batch_size": eval_batch_size}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name, value in {"num_workers": num_workers, "seed": seed, "split_seed": split_seed}.items():
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
        self._given_statistics = {} if mean is None or std is None else {"mean": tuple(mean), "std": tuple(std)}
        self._agreement: Agreement | None = None
        self._preprocessing: Preprocessing | None = None
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.coarse = coarse
        self._computed: tuple[ImageSource, tuple[list[float], list[float]]] | None = None
        self._prepared: dict[Split, ImageSource | None] = {}  # loaded by prepare_data and not yet used by setup
        self._splits: dict[Split, ImageSource | None] = {}
        self._training: ImageSource  # training images with the labels used in training, after setup
        self._bank: ImageSource  # labelled training images with their true labels, after setup
        self._train_loader: ResumableLoader | None = None
        self._resume: dict[str, int] | None = None

    def load(self, split: Split) -> ImageSource | None:
        """Read one split; the one method that a data set must define.

        Args:
            split: "train", "val" or "test".

        Returns:
            ``LabelledImages``, or any other ``ImageSource``; None if the data set has no such split; validation
            images are then held out from the training images.
        """
        raise NotImplementedError(f"{type(self).__name__} must define load(split), which reads its images")

    def prepare_data(self) -> None:
        """Download, decode and cache on one process, before the others read."""
        self._agree()
        splits: tuple[Split, ...] = ("train", "val", "test")
        for split in splits:
            self._prepared[split] = self.load(split)

    def setup(self, stage: str | None = None) -> None:
        """Load the training split and the other splits that ``stage`` needs, each once."""
        overfit = getattr(self.trainer, "overfit_batches", 0)
        if overfit:
            raise ValueError(
                f"overfit_batches must be 0, got {overfit}: Lightning then replaces the balanced sampler by a "
                "sequential one; use limit_train_batches instead"
            )
        self._agree()
        if "train" not in self._splits:
            self._setup_training()
        self._complete(stage)
        if stage in ("test", "predict", None) and "test" not in self._splits:
            self._splits["test"] = self._read("test")
            _check_same_classes("test", self._splits["test"], self.class_names)
        silence_inapplicable_warnings(self._splits["train"], self._splits["val"], self.num_workers)

    @property
    def preprocessing(self) -> Preprocessing:
        """How images are read and normalised; before ``setup`` as far as it is known then."""
        if self._preprocessing is None:
            self._agree()
        assert self._preprocessing is not None
        return self._preprocessing

    def _preprocessing_arguments(self) -> dict[str, Any]:
        """Fields of the preprocessing that arguments of this data module set; an argument of None sets none."""
        names = {field.name for field in fields(Preprocessing)} - {"mean", "std", "channels"}
        given = {name: getattr(self, name, None) for name in names}
        return {**{name: value for name, value in given.items() if value is not None}, **self._given_statistics}

    def _module(self) -> Any:
        return None if self.trainer is None else self.trainer.lightning_module

    def _agree(self) -> None:
        """Find the preprocessing that images are read with; images that were read with another one are dropped."""
        agreement = agree(self._preprocessing_arguments(), self._module(), type(self).__name__)
        before = [getattr(self._agreement, "preprocessing", None), self._preprocessing]
        if not any(each is None or read_alike(agreement.preprocessing, each) for each in before):
            self._splits.clear()
            self._prepared.clear()
        self._agreement, self._preprocessing = agreement, agreement.preprocessing

    def _complete(self, stage: str | None) -> None:
        """Add what follows from the training images, and give the preprocessing to the module of a fit."""
        train, module = self._splits["train"], self._module()
        assert train is not None
        assert self._agreement is not None
        preprocessing = self._agreement.completed(tuple(train.__getitems__([0])[0].shape[1:]))
        if preprocessing.mean is None:
            mean, std = self._statistics(train)
            preprocessing = replace(preprocessing, mean=tuple(mean), std=tuple(std))
        assert preprocessing.mean is not None
        assert preprocessing.std is not None
        self._preprocessing = preprocessing
        self.mean, self.std = list(preprocessing.mean), list(preprocessing.std)
        if stage == "fit" and module is not None:
            if takes_preprocessing(module):
                module.preprocessing = preprocessing
            warn_of_stem(getattr(module, "encoder", None), preprocessing.size)

    def _statistics(self, train: ImageSource) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of the training images, computed once."""
        if self._computed is None or self._computed[0] is not train:
            self._computed = (train, channel_statistics(train, self.split_seed))
        return self._computed[1]

    def _settle(self) -> None:
        """Agree again once the trainer has loaded the checkpoint of its module, just before the first loader."""
        module = self._module()
        if not takes_preprocessing(module) or module.preprocessing == self._preprocessing:
            return
        assert self.trainer is not None
        if module.preprocessing is not None:
            self.setup(self.trainer.state.fn)
        elif self.trainer.ckpt_path and not self._given_statistics:
            rank_zero_warn(
                f"checkpoint {self.trainer.ckpt_path} does not hold the preprocessing of its images, because an older "
                "version wrote it: size, mean and std are those of this data module"
            )

    def _read(self, split: Split) -> ImageSource | None:
        return self._prepared.pop(split) if split in self._prepared else self.load(split)

    def _setup_training(self) -> None:
        train, val = self._read("train"), self._read("val")
        if train is None:
            raise ValueError(f"{type(self).__name__}.load('train') must return images, got None")
        self.class_names = list(train.class_names)
        self.num_classes = len(self.class_names)
        if val is None and self.val_fraction > 0:
            kept, held = stratified_split(train.labels, self.val_fraction, self.split_seed)
            train, val = train.subset(kept), train.subset(held)
        _check_same_classes("val", val, self.class_names)
        self._label_training(train)
        self.train_class_names = list(self._training.class_names)
        _check_smallest_class(self._training, self.samples_per_class)
        self._splits["train"], self._splits["val"] = train, val

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
        self._settle()
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
        arguments = self._loader_arguments()
        self._train_loader = ResumableLoader(self._training, self._train_sampler(), processed, **arguments)
        if self._resume is not None and self.trainer is not None and self.trainer.ckpt_path:
            self._train_loader.load_state_dict(self._resume)
        self._resume = None
        return self._train_loader

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

    def _evaluation_loader(self, source: ImageSource, rank: int | None = None, world: int | None = None) -> DataLoader:
        rank, world = self.rank if rank is None else rank, self.world_size if world is None else world
        return DataLoader(
            source,  # type: ignore[arg-type]
            batch_size=evaluation_batch_size(len(source), world, self.eval_batch_size),
            sampler=EvaluationSampler(len(source), rank, world),
            collate_fn=keep_batch,
            **self._loader_arguments(),
        )

    def _loader_arguments(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
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
                of its augmentation, which determines it.
            augment: Whether to make V augmented views of each image.

        Returns:
            float32 images ``(N * V, C, H, W)`` of the size of ``preprocessing``, normalised by it, and labels
            ``(N * V,)``; V is 1 if ``augment`` is False.

        Raises:
            RuntimeError: Before ``setup``.
            ValueError: If a batch without a seed is to be augmented, or the images do not have the model's channels.
        """
        images, labels, *draw = batch
        if not self._splits:
            raise RuntimeError(f"{type(self).__name__}.setup() must run before a batch is prepared")
        images = self.preprocessing.fit(images)
        if augment:
            images, labels = images.repeat_interleave(self.views, 0), labels.repeat_interleave(self.views, 0)
            if self.augment is not None:
                if not draw:
                    raise ValueError(
                        "batch must be (images, labels, draw) to be augmented, got no draw (seed of the augmentation)"
                    )
                images = self.augment(images, torch.Generator(images.device).manual_seed(draw[0]))
        return self.preprocessing.normalize(images), labels


def _check_same_classes(split: str, source: ImageSource | None, class_names: list[str]) -> None:
    """Raise ValueError, naming the classes that differ, unless a split has the classes of the training split."""
    if source is None or list(source.class_names) == class_names:
        return
    missing, extra = set(class_names) - set(source.class_names), set(source.class_names) - set(class_names)
    found = [f"it lacks {name_list(missing)}"] * bool(missing) + [f"training lacks {name_list(extra)}"] * bool(extra)
    raise ValueError(
        f"the {split} split must have the classes of the training split in the same order: "
        f"{', and '.join(found) or 'the order differs'}"
    )


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
