"""The command: python -m benchmarks.imagenet_model, memory and bytes of a step of configs/imagenet.yaml, as a model.

Nothing is run: the encoder is on torch's meta device, which knows shapes and no values. Activations are the tensors
that autograd keeps for the backward pass, each storage once, in bfloat16 as under ``bf16-mixed``. The reserve of the
allocator, the workspace of cuDNN and the batch that is prefetched come on top.
"""

import torch
import yaml
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.experiments import ROOT
from benchmarks.scaling_model import sums_cost
from simo_lightning import ImageEncoder

CONFIG = ROOT / "configs" / "imagenet.yaml"
IMAGES, CLASSES = 1_281_167, 1_000  # of ImageNet-1k's training split
NODES = (1, 8)


def activation_bytes(encoder: torch.nn.Module, images: int, size: int) -> int:
    """Bytes that autograd keeps of a forward pass in bfloat16, without the parameters."""
    encoder = encoder.to("meta", torch.bfloat16).train()
    own = {each.untyped_storage()._cdata for each in [*encoder.parameters(), *encoder.buffers()]}
    kept: list[Tensor] = []  # alive, so that no storage has the number of one that is gone

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        output = encoder(torch.empty(images, 3, size, size, dtype=torch.bfloat16, device="meta"))
    assert output.requires_grad
    storages = {each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in kept}
    return sum(size for storage, size in storages.items() if storage not in own)


def lines() -> list[str]:
    """What the comment of the config says."""
    config = yaml.safe_load(CONFIG.read_text())
    model, data, devices = config["model"]["init_args"], config["data"]["init_args"], config["trainer"]["devices"]
    given = model["encoder"]["init_args"]
    images, size = data["classes_per_batch"] * data["samples_per_class"], data["image_size"]
    encoder = ImageEncoder(**given)
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    fixed = {"weights": 4, "gradients": 4, "AdamW": 8, "bfloat16 copies": 2}
    activations = activation_bytes(encoder, images, size)
    batch = images * 3 * size**2 * (1 + 4)  # uint8 as it comes, and float32 once normalised
    total = activations + batch + parameters * sum(fixed.values())
    found = [
        f"{parameters / 1e6:.1f} million parameters; MB on each GPU: "
        + ", ".join(f"{name} {parameters * each / 1e6:,.0f}" for name, each in fixed.items()),
        f"activations of {images} images {activations / 1e9:.1f} GB, the batch itself {batch / 1e9:.2f} GB; "
        f"in all {total / 1e9:.1f} GB",
    ]
    for nodes in NODES:
        world = nodes * devices
        classes = min(CLASSES, world * data["classes_per_batch"])
        loss, _ = sums_cost(world, images, given["embedding_dim"], classes, data["classes_per_batch"])
        gradients = 2 * (world - 1) / world * 4 * parameters
        steps = IMAGES // (world * images)
        found.append(
            f"{world} GPUs: {world * images:,} images of {classes:,} classes a step, {steps:,} steps "
            f"an epoch; each sends {gradients / 1e6:,.0f} MB of gradients, {loss / 1e6:.2f} MB for the loss"
        )
    return found


if __name__ == "__main__":
    print("\n".join(lines()))
