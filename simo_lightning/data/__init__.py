"""Images in memory as uint8, balanced batches, batched augmentation on the device."""

from simo_lightning.data.augment import BatchAugment
from simo_lightning.data.datamodule import PairDataModule
from simo_lightning.data.datasets import (
    CIFAR10PairDataModule,
    CIFAR100PairDataModule,
    DigitsPairDataModule,
    ImageFolderPairDataModule,
    SemiSupervisedCIFAR10PairDataModule,
    SemiSupervisedCIFAR100PairDataModule,
    SemiSupervisedDigitsPairDataModule,
    SemiSupervisedImageFolderPairDataModule,
    SemiSupervisedTensorPairDataModule,
    TensorPairDataModule,
    load_cifar,
    load_digits,
)
from simo_lightning.data.folder import FolderImages, find_splits
from simo_lightning.data.hub import HubImages, HubPairDataModule, SemiSupervisedHubPairDataModule
from simo_lightning.data.labels import Relabelled
from simo_lightning.data.loader import ResumableLoader, TrainingBatch
from simo_lightning.data.reading import load_image_folder
from simo_lightning.data.sampler import ClassBalancedSampler, EvaluationSampler, pair_indices
from simo_lightning.data.semi import SemiBalancedSampler, SemiSupervisedPairDataModule
from simo_lightning.data.sources import ImageSource, LabelledImages

__all__ = [
    "BatchAugment",
    "CIFAR10PairDataModule",
    "CIFAR100PairDataModule",
    "ClassBalancedSampler",
    "DigitsPairDataModule",
    "EvaluationSampler",
    "FolderImages",
    "HubImages",
    "HubPairDataModule",
    "ImageFolderPairDataModule",
    "ImageSource",
    "LabelledImages",
    "PairDataModule",
    "Relabelled",
    "ResumableLoader",
    "SemiBalancedSampler",
    "SemiSupervisedCIFAR10PairDataModule",
    "SemiSupervisedCIFAR100PairDataModule",
    "SemiSupervisedDigitsPairDataModule",
    "SemiSupervisedHubPairDataModule",
    "SemiSupervisedImageFolderPairDataModule",
    "SemiSupervisedPairDataModule",
    "SemiSupervisedTensorPairDataModule",
    "TensorPairDataModule",
    "TrainingBatch",
    "find_splits",
    "load_cifar",
    "load_digits",
    "load_image_folder",
    "pair_indices",
]
