"""LoRA adapters in a backbone, by peft: the extra ``lora``."""

from typing import Any

from torch import nn

from simo_lightning.extras import import_extra

ARGUMENTS = ("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "use_rslora")


def add_lora(backbone: nn.Module, lora: dict[str, Any]) -> None:
    """Freeze a backbone and add low-rank adapters to it, in place.

    Args:
        backbone: The module.
        lora: Arguments of ``peft.LoraConfig``, some of :data:`ARGUMENTS`. ``target_modules`` is by default every linear
            layer, or every convolution without groups of a backbone that has no linear layer.

    Raises:
        ValueError: If there is another argument, or one is out of its range.
        ModuleNotFoundError: If peft is not installed.
    """
    unknown = sorted(lora.keys() - set(ARGUMENTS))
    if unknown:  # others make peft read files or import modules
        raise ValueError(f"lora takes {', '.join(ARGUMENTS)}, got {', '.join(unknown)}")
    import_extra("peft")
    from peft import LoraConfig, inject_adapter_in_model

    targets = [name for name, module in backbone.named_modules() if isinstance(module, nn.Linear)] or [
        name for name, module in backbone.named_modules() if isinstance(module, nn.Conv2d) and module.groups == 1
    ]
    try:
        config = LoraConfig(**{"target_modules": targets, **lora})
        inject_adapter_in_model(config, backbone)
    except (TypeError, ValueError) as error:
        raise ValueError(f"lora does not fit the backbone: {str(error).splitlines()[0]}") from error
