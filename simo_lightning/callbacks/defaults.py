"""The callbacks that SimOModule adds to a trainer."""

from lightning.pytorch import Callback, Trainer

from simo_lightning.callbacks.evaluation import EvaluationCallback
from simo_lightning.callbacks.geometry import GeometryMonitor
from simo_lightning.callbacks.knn import OnlineKNN


def default_callbacks(trainer: Trainer) -> list[Callback]:
    """OnlineKNN and GeometryMonitor, without those that the trainer has and those that lack something.

    Args:
        trainer: With its callbacks and data module.

    Returns:
        Callbacks to add. They do not end the run if something is missing (``required`` is False). None for a
        barebones trainer, which does not log.
    """
    if trainer.barebones:
        return []
    candidates: list[EvaluationCallback] = [OnlineKNN(), GeometryMonitor()]
    added: list[Callback] = []
    for callback in candidates:
        callback.required = False
        has_it = any(isinstance(other, type(callback)) for other in trainer.callbacks)  # type: ignore[attr-defined]
        if not has_it and not callback.missing(trainer):
            added.append(callback)
    return added
