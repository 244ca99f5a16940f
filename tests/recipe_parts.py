"""A base config for the tests of benchmarks/recipes."""

from pathlib import Path
from typing import Any

import yaml

# Digits with an encoder small enough for a test: 12 batches of 10 x 10 an epoch.
DIGITS: dict[str, Any] = {
    "trainer": {"log_every_n_steps": 1},
    "model": {
        "class_path": "simo_lightning.SimOModule",
        "init_args": {
            "encoder": {
                "class_path": "simo_lightning.ImageEncoder",
                "init_args": {"backbone": "resnet10", "width": 0.125, "in_channels": 1, "embedding_dim": 16},
            },
            "optimizer": {"class_path": "torch.optim.AdamW"},
            "lr_scheduler": {"class_path": "simo_lightning.OneCycle"},
        },
    },
    "data": {"class_path": "simo_lightning.DigitsPairDataModule", "init_args": {"samples_per_class": 10}},
}


def write_yaml(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path
