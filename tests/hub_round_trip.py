"""What a process of test_sharing.py runs against a server: upload, download and their errors.

python -m tests.hub_round_trip CHECKPOINT IMAGES REPORT
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from simo_lightning import Embedder, SimOModule
from simo_lightning.cli import main
from simo_lightning.sharing import CardFields, download_pretrained


def error_of(call: Any, *args: Any, **kwargs: Any) -> str:
    try:
        call(*args, **kwargs)
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def round_trip(checkpoint: str, images: str, report: Path) -> None:
    uint8 = torch.from_numpy(np.load(images))
    main(["share", checkpoint, "--out", "folder", "--push", "me/model", "--private", "true", "--license", "mit"])
    module = SimOModule.from_pretrained("me/model")
    assert module.classes is not None
    assert module.classes.means is not None
    with torch.no_grad():
        np.save(report.with_suffix(".npy"), module.embed(uint8).numpy())
    folder = download_pretrained("me/model")
    found = {
        "classes": module.classes.names,
        "means": module.classes.means.tolist(),
        "files": sorted(path.name for path in folder.iterdir()),
        "same": bool((Embedder.load(folder)(uint8) == np.load(report.with_suffix(".npy"))).all()),
        "pushed": module.push_to_hub("me/other", CardFields(license="cc-by-4.0")),
        "none": error_of(SimOModule.from_pretrained, "me/none"),
        "no name": error_of(SimOModule.from_pretrained, "../me/none"),
        "cached": SimOModule.from_pretrained("me/model", local_files_only=True).classes.names,
        "not cached": error_of(SimOModule.from_pretrained, "me/none", local_files_only=True),
        "refused": error_of(module.push_to_hub, "me/model", token="another"),
    }
    report.write_text(json.dumps(found))


if __name__ == "__main__":
    round_trip(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
