"""Images in memory or in files, balanced batches, augmentation in batches on the device or one by one in workers."""

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
from simo_lightning.data.loader import DrawnBatches, DrawnIndices, ResumableLoader, TrainingBatch
from simo_lightning.data.manifest import Manifest, read_manifest
from simo_lightning.data.packed import PackedFolder, PackedImages, open_packed
from simo_lightning.data.packing import pack_images, verify_packed
from simo_lightning.data.photo_augment import Crop, PhotoAugment
from simo_lightning.data.pictures import AugmentedPictures
from simo_lightning.data.reading import load_image_folder
from simo_lightning.data.records import PackedFiles
from simo_lightning.data.sampler import ClassBalancedSampler, EvaluationSampler, pair_indices
from simo_lightning.data.semi import SemiBalancedSampler, SemiSupervisedPairDataModule
from simo_lightning.data.sources import DecodedFiles, ImageSource, LabelledImages, PictureFiles, whole_picture

__all__ = [
    "AugmentedPictures",
    "BatchAugment",
    "CIFAR10PairDataModule",
    "CIFAR100PairDataModule",
    "ClassBalancedSampler",
    "Crop",
    "DecodedFiles",
    "DigitsPairDataModule",
    "DrawnBatches",
    "DrawnIndices",
    "EvaluationSampler",
    "FolderImages",
    "HubImages",
    "HubPairDataModule",
    "ImageFolderPairDataModule",
    "ImageSource",
    "LabelledImages",
    "Manifest",
    "PackedFiles",
    "PackedFolder",
    "PackedImages",
    "PairDataModule",
    "PhotoAugment",
    "PictureFiles",
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
    "open_packed",
    "pack_images",
    "pair_indices",
    "read_manifest",
    "verify_packed",
    "whole_picture",
]
