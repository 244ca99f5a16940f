"""A small untrained model in a checkpoint, and image files, for the tests of what is done with a trained one."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from simo_lightning import ImageEncoder, Preprocessing, SimOModule
from simo_lightning.checkpoints import TrainingClasses

CLASSES = ["apple", "pear", "plum"]


def write_checkpoint(path: Path, seed: int = 0, means: bool = True) -> Path:
    """An encoder of 16 dimensions at 32 pixels with three classes, of which the last has no mean."""
    torch.manual_seed(seed)
    preprocessing = Preprocessing(32, mean=(0.5,) * 3, std=(0.25,) * 3)
    module = SimOModule(ImageEncoder("resnet10", width=0.125, image_size=32), preprocessing=preprocessing)
    if means:
        module.classes = TrainingClasses(CLASSES)
        module.set_class_means(torch.cat([torch.randn(2, 16), torch.full((1, 16), torch.nan)]))
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict(), "global_step": 0}
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)
    return path


def write_images(folder: Path, names: list[str], seed: int = 0) -> list[Path]:
    """Image files of random colours, 40 x 36 pixels."""
    random = np.random.default_rng(seed)
    paths = [folder / name for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (36, 40, 3), dtype=np.uint8)).save(path)
    return paths
