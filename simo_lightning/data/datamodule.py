"""The data module that every data set shares: splits, balanced batches, augmentation on the device."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from simo_lightning.data.augment import BatchAugment
from simo_lightning.data.labels import Relabelled, coarse_index, index_by_name, present_classes, without_classes
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
from simo_lightning.data.preprocessing import Agreement, agree, read_alike, warn_of_stem
from simo_lightning.data.sampler import (
    ClassBalancedSampler,
    ClassSampling,
    EvaluationSampler,
    SmallClasses,
    check_sampling,
    evaluation_batch_size,
)
from simo_lightning.data.sources import (
    ImageSource,
    JoinedImages,
    Split,
    channel_statistics,
    in_memory,
    name_list,
    stratified_split,
    stratified_subset,
)
from simo_lightning.data.splits import draw_unseen_classes, hold_out_classes
from simo_lightning.lightning_private import batches_processed
from simo_lightning.preprocessing import Preprocessing, takes_preprocessing

Batch = tuple[Tensor, Tensor]
SMALL = 64  # pixels; larger images are photographs, which "auto" augments one by one


class PairDataModule(LightningDataModule):
    """Balanced training batches of labelled images, and batches in a fixed order for evaluation.

    A subclass adds a data set by one method, ``load(split)``. A training batch on the device is ``(images, labels)`` of
    P classes x K images x V views, normalised, the views of an image adjacent. Order and augmentation depend only on
    ``seed``, the epoch and the index of the batch, so that a resumed run draws the same batches.

    Args:
        classes_per_batch: P, number of classes in a training batch of each rank; null: 10, or all if there are fewer.
        samples_per_class: K, number of images of each class in a batch; at least 2.
        views: V, number of augmented copies of each image.
        val_fraction: Share of each training class held out for validation, in [0, 1); 0: no validation. Not used if the
            data set has its own validation split. A class of one image stays in training.
        split_seed: Seed of that split and of the bank's subset, separate from ``seed`` so that runs with several seeds
            use the same split.
        seed: Seed of batches and augmentation; the same config and seeds give the same weights.
        augment: Augmentation of the training images. ``BatchAugment``: whole batches on their device, for small images
            in memory. ``PhotoAugment`` or any callable on one picture, such as those of torchvision.transforms.v2: each
            picture on its own, whole and before it is resized, in the workers. auto: ``PhotoAugment()`` if images are
            larger than 64 pixels, else ``BatchAugment()``. null: none.
        mean: Mean of each channel, on the scale 0..1; null: that of the model, or computed from the training images.
        std: Standard deviation of each channel on the same scale; with ``mean``.
        eval_batch_size: Images in an evaluation batch of each rank; a nearby size is used if the ranks would otherwise
            have different numbers of batches.
        num_workers: Processes that read batches, for each loader. null: none for images in memory; one for each core,
            at most 16 and divided among the processes of a node, where images are read from disk or augmented one by
            one.
        coarse: Coarse classes to train on, each with the classes that it joins, such as
            {animal: [cat, dog], vehicle: [ship, truck]}. Validation, test and bank keep the true classes.
        small_classes: What to do with a class of fewer than K training images. "repeat": further augmented views of its
            images fill its place in a batch, each image used once before any is used twice. "skip": training leaves the
            class out; it stays a class of validation, test and bank. "error": it raises.
        class_sampling: How often classes appear in an epoch. "natural": in proportion to their images, each image at
            most once; "balanced": all equally often; "sqrt": in proportion to the square root of their images.
            ``ClassBalancedSampler`` defines an epoch of each. With classes of equal size they are the same.
        unseen_classes: Classes that training does not see, held out for validation and test with their images of all
            splits: their number, their share of the training classes in (0, 1), their names, or a text file with one
            name per line. A number or a share is drawn by ``split_seed``. null: none.
        unseen_val_share: Share of these classes for validation, rounded down; the others are for test. Where it is 0
            (or 1), validation (or test) keeps its images of seen classes.

    The images are preprocessed as the model requires: a module with a ``preprocessing``, such as one from a checkpoint,
    determines size, channels, mean and std, and images in memory of another size are resized. Otherwise they follow
    from the arguments here, then from the encoder's ``preprocessing`` (pretrained weights), then from the training
    images; a fit gives the result to the module, whose checkpoints store it.

    Attributes:
        preprocessing: The preprocessing; mean and std are known after ``setup``.
        class_names: Name of each true class, after ``setup``: those of training, then those that only other splits
            have. Labels of validation, test, gallery and bank are indices into it. Loading a further split may append
            to it.
        train_class_names: Names of the classes of training, the true or the coarse ones, after ``setup``.

    Raises:
        ValueError: If an argument is out of range, or only one of ``mean`` and ``std`` is given; in ``setup`` also if
            the images do not have the model's channels, an argument contradicts the model's preprocessing, a class has
            fewer than ``samples_per_class`` images and ``small_classes`` is "error", or unseen classes cannot be drawn.

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
        classes_per_batch: int | None = None,
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
        small_classes: SmallClasses = "repeat",
        class_sampling: ClassSampling = "natural",
        unseen_classes: int | float | list[str] | str | None = None,
        unseen_val_share: float = 0.5,
    ) -> None:
        super().__init__()
        check_sampling(small_classes, class_sampling)
        if not 0 <= unseen_val_share <= 1:
            raise ValueError(f"unseen_val_share must lie in [0, 1], got {unseen_val_share}")
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
        self._given_statistics = {} if mean is None or std is None else {"mean": tuple(mean), "std": tuple(std)}
        self._agreement: Agreement | None = None
        self._preprocessing: Preprocessing | None = None
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.coarse = coarse
        self.small_classes: SmallClasses = small_classes
        self.class_sampling: ClassSampling = class_sampling
        self.unseen_classes = unseen_classes
        self.unseen_val_share = unseen_val_share
        self._coarse = coarse  # without unseen classes, after setup
        self._computed: tuple[ImageSource, tuple[list[float], list[float]]] | None = None
        self._prepared: dict[Split, ImageSource | None] = {}  # loaded by prepare_data and not yet used by setup
        self._splits: dict[Split, ImageSource | None] = {}  # with labels that index class_names
        self._known: dict[Split, ImageSource | None] = {}  # held-out images of seen classes, beside unseen ones
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
        self._agree()
        fit = self.trainer is not None and self.trainer.state.fn in ("fit", "validate")
        for split in self._needed("fit" if fit else None):
            if _place(split) not in self._splits:
                self._prepared[split] = self.load(split)

    def _needed(self, stage: str | None) -> list[Split]:
        """Splits to load for a stage, in the order in which they are loaded."""
        needed: list[Split] = ["train", "val"]
        if stage in ("test", "predict", None) or self.unseen_classes is not None:
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
        self._agree()
        if "train" not in self._splits:
            self._setup_training()
        self._complete(stage)
        for split in self._needed(stage):
            if _place(split) not in self._splits:
                adapt = self._checked_unknown if split == "unknown" else self._with_known_names
                self._splits[_place(split)] = adapt(split, self._read(split))
        evaluated = [source for source in self._splits.values() if source is not None]
        silence_inapplicable_warnings(
            training=self._workers(self._training, training=True) == 0,
            evaluation=not any(self._workers(source) for source in evaluated),
            validation=self._splits["val"] is not None,
        )

    def _checked_unknown(self, split: Split, source: ImageSource | None) -> ImageSource | None:
        common = set() if source is None else set(present_classes(source)) & set(present_classes(self._bank))
        if common:
            raise ValueError(f"the {split} split must hold no class of training, got {name_list(common)}")
        return source

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
        self._coarse = self.coarse
        if self.unseen_classes is not None:
            train, val = self._hold_out_classes(train, val)
        elif val is None and self.val_fraction > 0:
            kept, held = stratified_split(train.labels, self.val_fraction, self.split_seed)
            train, val = train.subset(kept), train.subset(held)
        self.class_names = list(train.class_names)
        self._add_classes(val)
        self._add_classes(self._splits.get("test"))  # with unseen classes
        train = self._number_classes(train)
        self._splits["train"], self._splits["val"] = train, self._with_known_names("val", val)
        if "test" in self._splits:
            self._splits["test"] = self._with_known_names("test", self._splits["test"])
        for split, known in self._known.items():
            self._known[split] = None if known is None else index_by_name(known, self.class_names)

    def _hold_out_classes(self, train: ImageSource, val: ImageSource | None) -> tuple[ImageSource, ImageSource | None]:
        """Training and validation images without and with the unseen classes; keeps those of test."""
        assert self.unseen_classes is not None
        if {"query", "gallery"} & set(self.extra_splits):
            raise ValueError("unseen_classes must be null where the data set has a split 'query' or 'gallery' itself")
        test = self._read("test")
        names = {name for source in (train, val, test) if source is not None for name in present_classes(source)}
        drawn = draw_unseen_classes(self.unseen_classes, present_classes(train), names, self.split_seed)
        held = (drawn, self.unseen_val_share, self.val_fraction, self.split_seed)
        splits = hold_out_classes(train, val, test, *held)
        self._splits["test"] = splits.test
        self._known = {"val": splits.known_val, "test": splits.known_test}
        if self.coarse is not None:
            self._coarse = without_classes(self.coarse, splits.unseen)
        rank_zero_info(
            f"unseen_classes: training sees {_counted(splits.train)}; validation has {_counted(splits.val)} and test "
            f"{_counted(splits.test)}, {_classes(len(drawn))} held out"
        )
        return splits.train, splits.val

    def _number_classes(self, train: ImageSource) -> ImageSource:
        """Number the classes that are trained before all others; return the images with these labels."""
        self._label_training(train)
        names, counts = self._training.class_names, self._class_counts()
        least = self.samples_per_class if self.small_classes == "skip" else 1
        order = sorted(range(len(names)), key=lambda label: counts[label] < least)  # stable
        self.train_class_names = [names[label] for label in order if counts[label] >= least]
        if order != list(range(len(names))):
            ordered = [names[label] for label in order]
            if self._coarse is None:
                self.class_names = ordered + self.class_names[len(ordered) :]
                train = index_by_name(train, self.class_names)
            else:
                self._coarse = {name: self._coarse[name] for name in ordered}
            self._label_training(train)
        images = "images" if len(self._bank) == len(train) else "labelled images"
        self._report_small_classes(dict(zip(names, counts, strict=True)), images)
        if self.classes_per_batch is None:
            self.classes_per_batch = min(10, self.num_train_classes)
        return train

    def _class_counts(self) -> list[int]:
        """Labelled images of each class of training."""
        labels = self._training.labels
        names = self._training.class_names
        return torch.bincount(labels[labels < len(names)], minlength=len(names)).tolist()

    def _report_small_classes(self, counts: dict[str, int], images: str) -> None:
        """One line about the classes with fewer than K images; ValueError if ``small_classes`` is "error"."""
        k = self.samples_per_class
        small = {name: count for name, count in counts.items() if 0 < count < k}
        if not small:
            return
        smallest = min(small, key=lambda name: small[name])
        if self.small_classes == "error":
            raise ValueError(
                "samples_per_class must not exceed the smallest class of the training split: "
                f"{smallest!r} has {small[smallest]} {images}, got {k}; small_classes 'repeat' or 'skip' allows it"
            )
        classes = sum(count > 0 for count in counts.values())
        found = (
            f"small_classes {self.small_classes!r}: {len(small):,} of {classes:,} training classes with fewer than "
            f"samples_per_class = {k} {images} (smallest: {smallest!r} with {small[smallest]})"
        )
        if self.small_classes == "skip":
            rank_zero_info(f"{found}: training leaves out {name_list(small)}; validation, test and bank keep them")
            return
        views = "further augmented views" if self.augment is not None else "copies (augment is null)"
        repeats = sum(k - count for count in small.values())
        rank_zero_info(f"{found}: filled with {views} of their images, {repeats:,} for all of these classes once")

    def _add_classes(self, source: ImageSource | None) -> None:
        """Append the classes of a split that ``class_names`` lacks."""
        known = set(self.class_names)
        if source is not None:
            self.class_names = self.class_names + [name for name in present_classes(source) if name not in known]

    def _with_known_names(self, split: str, source: ImageSource | None) -> ImageSource | None:
        """The images of a split with labels that index ``class_names``, to which its further classes are added."""
        if source is None:
            return None
        self._add_classes(source)
        names, seen = present_classes(source), set(present_classes(self._bank))
        unseen = [name for name in names if name not in seen]
        if unseen and self.unseen_classes is None:
            rank_zero_info(
                f"{split} split: {len(unseen):,} of its {_classes(len(names))} without training images "
                f"({name_list(unseen)}): retrieval metrics count them, kNN against training images and probes do not"
            )
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
        if self._coarse is not None:
            labels = coarse_index(train.class_names, self._coarse)[train.labels]
            self._training = Relabelled(train, labels, list(self._coarse))

    def _train_sampler(self) -> ClassBalancedSampler:
        return ClassBalancedSampler(self._training.labels, **self._sampling())

    def _sampling(self) -> dict[str, Any]:
        names = ("classes_per_batch", "samples_per_class", "seed", "rank", "world_size", "small_classes")
        return {name: getattr(self, name) for name in (*names, "class_sampling")}

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
        arguments = self._loader_arguments(self._workers(self._training, training=True))
        self._train_loader = ResumableLoader(self._training_dataset(), self._train_sampler(), processed, **arguments)
        if self._resume is not None and self.trainer is not None and self.trainer.ckpt_path:
            self._train_loader.load_state_dict(self._resume)
        self._resume = None
        return self._train_loader

    def _training_dataset(self) -> Any:
        """What the training loader reads, with ``__getitems__``."""
        augment = self._augmentation()
        if augment is None or isinstance(augment, BatchAugment):
            return self._training
        return AugmentedPictures(self._training, augment, self.preprocessing, self.views)

    def _augmentation(self) -> Augment | None:
        """``augment``, chosen by the size of the images where it is "auto"."""
        if self.augment != "auto":
            return self.augment
        return PhotoAugment() if max(self.preprocessing.size) > SMALL else BatchAugment()

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
        """Keep the position for the training loader, which is created later.

        A strategy for sharded weights restores after the optimizer is made, whose schedule may have read the length of
        the training loader; it then exists and takes the position at once.
        """
        self._resume = state_dict.get("train_loader")
        exists = self._train_loader is not None and self.trainer is not None
        if exists and self._resume is not None and self.trainer.train_dataloader is self._train_loader:  # type: ignore[union-attr]
            self._train_loader.load_state_dict(self._resume)  # type: ignore[union-attr]
            self._resume = None

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
        return self._evaluation_loader(self._limited(self._bank, limit), rank, world_size)

    def gallery_dataloader(self) -> DataLoader | None:
        """This rank's share of the gallery, the raw images among which those of the test split find their class.

        Returns:
            Loader of uint8 batches for ``prepare(batch, augment=False)``; None if the data set has no split
            ``gallery``, and during a fit or a validation.
        """
        trainer, gallery = self.trainer, self._splits.get("gallery")
        if trainer is not None and (trainer.training or trainer.validating or trainer.sanity_checking):
            return None
        return None if gallery is None else self._evaluation_loader(gallery)

    def unknown_dataloader(
        self, split: Literal["val", "test"] | None = None, limit: int | None = None
    ) -> DataLoader | None:
        """This rank's share of the raw images that belong to no class of training.

        They are the images of the split ``unknown``, with labels of at least ``num_classes``; if the data set has no
        such split, the images of validation or test whose class has no training image.

        Args:
            split: "val" or "test"; None: "test" while the trainer tests, else "val".
            limit: Number of images over all ranks, the classes in proportion, drawn by ``split_seed``; None: all.

        Returns:
            Loader of uint8 batches for ``prepare(batch, augment=False)``; None if there are no such images, or no
            held-out images of known classes to tell them from.
        """
        known, unknown = self._known_and_unknown(split or self._evaluated())
        return None if known is None or unknown is None else self._evaluation_loader(self._limited(unknown, limit))

    def known_dataloader(
        self, split: Literal["val", "test"] | None = None, limit: int | None = None
    ) -> DataLoader | None:
        """This rank's share of the held-out raw images of classes of training, where validation or test has none.

        That is so with ``unseen_classes``. They are then the data set's validation (test) images of the other classes,
        or else the ``val_fraction`` of the training images that is held out for this.

        Args:
            split: "val" or "test"; None: "test" while the trainer tests, else "val".
            limit: As for :meth:`unknown_dataloader`.

        Returns:
            Loader of uint8 batches for ``prepare(batch, augment=False)``; None where the images of the split whose
            class has training images serve, or there are none.
        """
        self._need("train")
        known = self._known.get(split or self._evaluated())
        return None if known is None else self._evaluation_loader(self._limited(known, limit))

    def _limited(self, source: ImageSource, limit: int | None) -> ImageSource:
        """At most ``limit`` images, the classes in proportion."""
        if limit is None or limit >= len(source):
            return source
        return source.subset(stratified_subset(source.labels, limit, self.split_seed))

    def _evaluated(self) -> Literal["val", "test"]:
        return "test" if self.trainer is not None and self.trainer.testing else "val"

    def _known_and_unknown(self, split: Split) -> tuple[ImageSource | None, ImageSource | None]:
        """Held-out images of classes of training, and images of no class of training."""
        self._need("train")
        source, known, unknown = self._splits.get(split), self._known.get(split), self._splits.get("unknown")
        if unknown is not None:
            unknown = Relabelled(unknown, self.num_classes + unknown.labels, list(unknown.class_names))
        if source is not None:
            in_bank = torch.zeros(self.num_classes, dtype=torch.bool)
            in_bank[self._bank.labels] = True
            is_known = in_bank[source.labels]
            known = _chosen(source, is_known) if known is None else known
            unknown = _chosen(source, ~is_known) if unknown is None else unknown
        return known, unknown

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
            float32 images ``(N * V, C, H, W)`` of the size of ``preprocessing``, normalised by it, and labels
            ``(N * V,)``; V is 1 if ``augment`` is False.

        Raises:
            RuntimeError: Before ``setup``.
            ValueError: If a batch without a seed is to be augmented, or the images do not have the model's channels.
        """
        images, labels, *draw = batch
        if not self._splits:
            raise RuntimeError(f"{type(self).__name__}.setup() must run before a batch is prepared")
        if images.ndim == 5:
            images, labels = images.flatten(0, 1), labels.repeat_interleave(images.shape[1], 0)
            return self.preprocessing(images), labels
        images = self.preprocessing.fit(images)
        if augment:
            images, labels = self._augmented(images, labels, *draw)
        return self.preprocessing.normalize(images), labels

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


def _place(split: Split) -> Split:
    """The split as which the images of ``split`` are used: queries are the test split."""
    return "test" if split == "query" else split


def _chosen(source: ImageSource, mask: Tensor) -> ImageSource | None:
    """The images where ``mask`` is True, not copied; None if there are none."""
    if mask.all():
        return source
    return JoinedImages([source], list(source.class_names), mask.nonzero().flatten()) if mask.any() else None


def _counted(source: ImageSource | None) -> str:
    if source is None:
        return "none"
    return f"{_classes(len(present_classes(source)))} ({len(source):,} image{'s' * (len(source) != 1)})"


def _classes(number: int) -> str:
    return f"{number:,} class{'es' * (number != 1)}"
