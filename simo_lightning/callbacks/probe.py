"""Judge the encoder by a linear classifier that is trained beside it."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from simo_lightning.callbacks.watcher import EmbeddingWatcher, embedded_rows
from simo_lightning.distributed import sum_over_ranks


class OnlineProbe(EmbeddingWatcher):
    """Log the accuracy of a linear classifier of the embeddings as ``val/probe`` and ``test/probe``.

    The classifier takes one step on the embeddings of every second training batch as the encoder returned them: of
    augmented images, in training mode. It has its own parameters and optimizer (Adam, cross-entropy) and sends no
    gradient to the encoder, whose training it leaves as it is to the last bit. It sees directions alone: each embedding
    is scaled to the norm ``sqrt(D)``, so that the learning rate fits at any scale. It starts from zeros, takes the mean
    over the rows of all processes, so that its weights are equal on all, and is part of the checkpoint. A row whose
    label is no class, as that of an image whose label is hidden, does not count. A module whose steps return no
    ``embeddings`` and ``labels`` is left alone; so are validation and test before any training.

    Args:
        lr: Learning rate of Adam.
        num_classes: C; None: ``trainer.datamodule.num_classes``.
        every_n_epochs: Epochs of training from one measurement to the next; it learns in every one. Validation and test
            by themselves always measure.
        every_n_batches: Training batches from one step of the classifier to the next. A step costs about 1.5 ms beside
            a small encoder on a CPU, most of it Python that the encoder has driven out of the cache.

    Attributes:
        head: The classifier, from unit embeddings times ``sqrt(D)`` to logits; None before the first batch.

    Raises:
        ValueError: If a number is out of its range; and when the first embeddings come, if the number of classes is not
            known.
    """

    def __init__(
        self, lr: float = 1e-2, num_classes: int | None = None, every_n_epochs: int = 1, every_n_batches: int = 2
    ) -> None:
        super().__init__(every_n_epochs)
        if lr <= 0:
            raise ValueError(f"lr must be positive, got {lr}")
        if every_n_batches < 1:
            raise ValueError(f"every_n_batches must be at least 1, got {every_n_batches}")
        self.every_n_batches = every_n_batches
        self.lr = lr
        self.num_classes = num_classes
        self.head: nn.Linear | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._state: dict[str, Any] = {}  # of a checkpoint, until the device is known
        self._counts: Tensor | None = None  # right answers and rows

    def state_dict(self) -> dict[str, Any]:
        """Classifier and optimizer.

        Returns:
            Their states; empty before the first batch.
        """
        if self.head is None or self._optimizer is None:
            return self._state
        return {"head": self.head.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on.

        Args:
            state_dict: Of :meth:`state_dict`.
        """
        self._state = state_dict
        self.head = self._optimizer = None

    def on_train_batch_end(  # noqa: D102
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        rows = None if batch_idx % self.every_n_batches else embedded_rows(outputs)
        if rows is not None:
            self._learn(self._head(trainer, rows[0]), *rows)

    def begin(self) -> None:
        """Forget the last epoch."""
        self._counts = None

    @torch.no_grad()
    def collect(self, trainer: Trainer, embeddings: Tensor, labels: Tensor) -> None:
        """Count right answers.

        Args:
            trainer: Unused.
            embeddings: ``(N, D)``.
            labels: ``(N,)``.
        """
        if not self.state_dict():
            return
        head = self._head(trainer, embeddings)
        with torch.autocast(embeddings.device.type, enabled=False):
            right = (head(_directions(embeddings)).argmax(dim=1) == labels).sum()
        counts = torch.stack([right, torch.full_like(right, len(labels))])
        self._counts = counts if self._counts is None else self._counts + counts

    def finish(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Log ``val/probe`` or ``test/probe``.

        Args:
            trainer: Unused.
            pl_module: Logs.
            stage: "val" or "test".
        """
        if self._counts is None:
            return
        right, rows = sum_over_ranks(self._counts)
        self.begin()
        # the value is that of all processes already; sync_dist tells Lightning that this was thought of
        pl_module.log(f"{stage}/probe", right.float() / rows, prog_bar=True, sync_dist=True)

    def _head(self, trainer: Trainer, embeddings: Tensor) -> nn.Linear:
        """The classifier on the device of the embeddings, made, or of a checkpoint, if there is none there."""
        if self.head is not None and self.head.weight.device == embeddings.device:
            return self.head
        num_classes = self.num_classes or getattr(getattr(trainer, "datamodule", None), "num_classes", None)
        if num_classes is None:
            raise ValueError(
                "OnlineProbe needs the number of classes: give OnlineProbe(num_classes=...) or a data module with the "
                "attribute num_classes, got neither"
            )
        state, self._state = self.state_dict(), {}
        # skip_init: weights drawn here would move the generator from which the encoder's training draws
        place = {"dtype": torch.float32, "device": embeddings.device}
        self.head = nn.utils.skip_init(nn.Linear, embeddings.shape[1], num_classes, **place)
        self._optimizer = torch.optim.Adam(self.head.parameters(), lr=self.lr, fused=embeddings.device.type != "mps")
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)
        if state:
            self.head.load_state_dict(state["head"])
            self._optimizer.load_state_dict(state["optimizer"])
        return self.head

    @torch.no_grad()
    def _learn(self, head: nn.Linear, embeddings: Tensor, labels: Tensor) -> None:
        """One step of Adam. The gradient of the cross-entropy is written out: probability less target."""
        assert self._optimizer is not None
        with torch.autocast(embeddings.device.type, enabled=False):
            directions, classes = _directions(embeddings), head.out_features  # (N, D), C
            slope = head(directions).softmax(dim=1)  # (N, C)
            # a label that is no class matches no column: its row of targets is zero, and so is its slope
            targets = labels.unsqueeze(1) == torch.arange(classes, device=labels.device)
            known = targets.any(dim=1, keepdim=True).to(slope.dtype)
            slope = slope.sub_(targets.to(slope.dtype)).mul_(known)
            parts = ((slope.T @ directions).flatten(), slope.sum(dim=0), known.sum().view(1))
            total = sum_over_ranks(torch.cat(parts))
        total /= total[-1].clone().clamp_(min=1)
        head.weight.grad, head.bias.grad = total[: -1 - classes].view_as(head.weight), total[-1 - classes : -1]
        self._optimizer.step()


def _directions(embeddings: Tensor) -> Tensor:
    """Rows over their norm, times sqrt(D), so that an entry has a mean square of 1; float32 (N, D)."""
    return nn.functional.normalize(embeddings.float(), dim=1).mul_(embeddings.shape[1] ** 0.5)
