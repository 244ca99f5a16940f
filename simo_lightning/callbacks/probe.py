"""Evaluate the encoder by a linear classifier that is trained alongside."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from simo_lightning.callbacks.evaluation import EvaluationCallback, step_embeddings
from simo_lightning.distributed import sum_over_ranks


class OnlineProbe(EvaluationCallback):
    """Log the accuracy of a linear classifier of the embeddings as ``val/probe`` and ``test/probe``.

    The classifier takes one step on the embeddings of every second training batch as the encoder returned them: of
    augmented images, in training mode. It has its own parameters and optimizer (Adam, cross-entropy) and passes no
    gradient to the encoder, whose training is the same to the last bit without it. Each embedding is scaled to the norm
    ``sqrt(D)``, so that the learning rate does not depend on its scale. The weights start at zero, are equal on all
    processes because gradients are averaged over all embeddings, and are part of the checkpoint. Embeddings whose label
    is not a class, such as those of unlabelled images, are ignored. A module whose steps return no ``embeddings`` and
    ``labels`` is not evaluated, and neither is a classifier that has not been trained.

    Args:
        lr: Learning rate of Adam.
        num_classes: C; None: ``trainer.datamodule.num_classes``.
        every_n_epochs: Epochs of training from one evaluation to the next; the classifier is trained in all of them.
            ``trainer.validate`` and ``trainer.test`` always evaluate.
        every_n_batches: Training batches from one step of the classifier to the next. A step takes about 1.5 ms
            beside a small encoder on a CPU.

    Attributes:
        head: The classifier, from unit embeddings times ``sqrt(D)`` to logits; None before the first batch.

    Raises:
        ValueError: If a number is out of its range; and when the first embeddings come, if the number of classes is
            unknown.
    """

    progress_bar = frozenset({"probe"})

    def __init__(
        self, lr: float = 1e-2, num_classes: int | None = None, every_n_epochs: int = 1, every_n_batches: int = 2
    ) -> None:
        super().__init__(every_n_epochs)
        if lr <= 0:
            raise ValueError(f"lr must be positive, got {lr}")
        if every_n_batches < 1:
            raise ValueError(f"every_n_batches must be at least 1, got {every_n_batches}")
        self.every_n_batches = every_n_batches
        self.lr = float(lr)  # a checkpoint takes plain data, which a NumPy number is not
        self.num_classes = num_classes
        self.head: nn.Linear | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._state: dict[str, Any] = {}  # of a checkpoint, until the device is known
        self._counts: Tensor | None = None  # (2,) correct predictions, embeddings

    @override
    def state_dict(self) -> dict[str, Any]:
        if self.head is None or self._optimizer is None:
            return self._state
        return {"head": self.head.state_dict(), "optimizer": self._optimizer.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = state_dict
        self.head = self._optimizer = None

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        returned = None if batch_idx % self.every_n_batches else step_embeddings(outputs)
        if returned is not None:
            self._learn(self._head(trainer, returned[0]), *returned)

    @override
    def reset(self, trainer: Trainer) -> None:
        self._counts = None

    @override
    @torch.no_grad()
    def update(self, trainer: Trainer, embeddings: Tensor, labels: Tensor, batch: Any, index: tuple[int, int]) -> None:
        if self.head is None and not self._state:
            return  # not trained yet
        head = self._head(trainer, embeddings)
        with torch.autocast(embeddings.device.type, enabled=False):
            correct = (head(_directions(embeddings)).argmax(dim=1) == labels).sum()
        counts = torch.stack([correct, torch.full_like(correct, len(labels))])
        self._counts = counts if self._counts is None else self._counts + counts

    @override
    def compute(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> dict[str, Tensor]:
        if self._counts is None:
            return {}
        correct, count = sum_over_ranks(self._counts)
        self.reset(trainer)
        return {"probe": correct.float() / count}

    def _head(self, trainer: Trainer, embeddings: Tensor) -> nn.Linear:
        """The classifier on the device of the embeddings; created or restored if there is none yet."""
        if self.head is not None and self.head.weight.device == embeddings.device:
            return self.head
        num_classes = self._known_num_classes(trainer)
        state, self._state = self.state_dict(), {}
        # skip_init, because random weights would advance the generator that the encoder's training uses
        options = {"dtype": torch.float32, "device": embeddings.device}
        self.head = nn.utils.skip_init(nn.Linear, embeddings.shape[1], num_classes, **options)
        self._optimizer = torch.optim.Adam(self.head.parameters(), lr=self.lr, fused=embeddings.device.type != "mps")
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)
        if state:
            self.head.load_state_dict(state["head"])
            self._optimizer.load_state_dict(state["optimizer"])
        return self.head

    def _learn(self, head: nn.Linear, embeddings: Tensor, labels: Tensor) -> None:
        """One step of Adam on the mean cross-entropy over the embeddings of all processes whose label is a class."""
        assert self._optimizer is not None
        parameters = list(head.parameters())
        known = (labels >= 0) & (labels < head.out_features)
        with torch.enable_grad(), torch.autocast(embeddings.device.type, enabled=False):
            logits = head(_directions(embeddings))  # (N, C)
            loss = nn.functional.cross_entropy(logits, torch.where(known, labels, -100), reduction="sum")
            gradients = torch.autograd.grad(loss, parameters)
        total = sum_over_ranks(torch.cat([*(part.flatten() for part in gradients), known.sum().view(1)]))
        *sums, count = total.split([*(part.numel() for part in gradients), 1])
        for parameter, part in zip(parameters, sums, strict=True):
            parameter.grad = part.view_as(parameter) / count.clamp(min=1)
        self._optimizer.step()


def _directions(embeddings: Tensor) -> Tensor:
    """Embeddings scaled to the norm sqrt(D), so that the mean square of the entries is 1; float32 (N, D)."""
    return nn.functional.normalize(embeddings.float(), dim=1).mul_(embeddings.shape[1] ** 0.5)
