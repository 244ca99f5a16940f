"""Evaluate the encoder by a linear classifier that is trained alongside."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from simo_lightning.callbacks.evaluation import EvaluationCallback, described, step_embeddings
from simo_lightning.distributed import largest_over_ranks, sum_over_ranks


class OnlineProbe(EvaluationCallback):
    """Log the accuracy of a linear classifier of the embeddings as ``val/probe`` and ``test/probe``.

    The classifier takes one step on the embeddings of every second training batch as the encoder returned them: of
    augmented images, in training mode. It has its own parameters and optimizer (Adam, cross-entropy) and passes no
    gradient to the encoder, whose training is the same to the last bit without it. Each embedding is scaled to the norm
    ``sqrt(D)``, so that the learning rate does not depend on its scale. The weights start at zero, are equal on all
    processes because gradients are averaged over all embeddings, and are part of the checkpoint. Embeddings whose label
    is not a class, such as those of unlabelled images, are ignored.

    It works with any module whose training and validation steps return ``embeddings`` and ``labels``. The accuracy is
    that over the images of the classes that it was trained on, which are matched by name where the data module has
    ``class_names``; with coarse labels in training it is that of the coarse classes. ``val/probe_macro`` is the mean of
    the accuracies of the classes. A classifier that has not been trained, or knows none of the classes, is not
    evaluated.

    Args:
        lr: Learning rate of Adam.
        num_classes: C in training; None: ``num_train_classes`` or ``num_classes`` of the data module, else one more
            than the largest label so far.
        every_n_epochs: Epochs of training from one evaluation to the next; the classifier is trained in all of them.
            ``trainer.validate`` and ``trainer.test`` always evaluate.
        every_n_batches: Training batches from one step of the classifier to the next. A step takes about 1.5 ms
            beside a small encoder on a CPU.

    Attributes:
        head: The classifier, from unit embeddings times ``sqrt(D)`` to logits; None before the first batch.
        class_names: Names of its classes; None before the first batch, or if the data module has no names.

    Raises:
        ValueError: If a number is out of its range; and with the first batch, if its step returns no embeddings.
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
        self.class_names: list[str] | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._state: dict[str, Any] = {}  # of a checkpoint, until the device is known
        self._counts: Tensor | None = None  # (2, C) correct predictions, embeddings
        self._class_of_label: Tensor | None = None  # of the labels of this epoch: the classifier's class, -1 for none

    @override
    def state_dict(self) -> dict[str, Any]:
        if self.head is None or self._optimizer is None:
            return self._state
        names = self.class_names
        return {"head": self.head.state_dict(), "optimizer": self._optimizer.state_dict(), "class_names": names}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = state_dict
        self.head = self._optimizer = self.class_names = None

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % self.every_n_batches:
            return
        returned = step_embeddings(outputs)
        if returned is not None:
            self._learn(self._training_head(trainer, *returned), *returned)
        elif self.required:
            raise ValueError(
                f"OnlineProbe requires that {type(pl_module).__name__}.training_step returns a dictionary with loss, "
                f"embeddings (N, D) and labels (N,), got {described(outputs)}"
            )

    @override
    def reset(self, trainer: Trainer) -> None:
        self._counts = self._class_of_label = None

    @override
    @torch.no_grad()
    def update(self, trainer: Trainer, embeddings: Tensor, labels: Tensor, batch: Any, index: tuple[int, int]) -> None:
        head = self._head_on(embeddings.device)
        if head is None:
            return  # not trained yet
        if self._class_of_label is None:
            self._class_of_label = self._match_classes(trainer, head.out_features).to(labels.device)
        is_class = (labels >= 0) & (labels < len(self._class_of_label))
        known = torch.where(is_class, self._class_of_label[labels * is_class], -1)
        with torch.autocast(embeddings.device.type, enabled=False):
            predicted = head(_directions(embeddings)).argmax(dim=1)
        size = head.out_features
        counts = torch.stack(
            [torch.bincount(part, minlength=size) for part in (known[predicted == known], known[known >= 0])]
        )
        self._counts = counts if self._counts is None else self._counts + counts

    @override
    def compute(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> dict[str, Tensor]:
        head = self._head_on(pl_module.device)
        if head is None:
            return {}
        own = self._counts
        if own is None:  # a process without images takes part in the sum
            own = torch.zeros(2, head.out_features, dtype=torch.long, device=pl_module.device)
        correct, count = sum_over_ranks(own).float()
        self.reset(trainer)
        present = count > 0
        if not present.any():
            line = f"OnlineProbe knows none of the classes of these images: {stage}/probe is not logged"
            if self._found_embeddings:
                self._tell_once(line)
            return {}
        macro = (correct[present] / count[present]).mean()
        return {"probe": correct.sum() / count.sum(), "probe_macro": macro}

    def _num_train_classes(self, trainer: Trainer) -> int | None:
        datamodule = getattr(trainer, "datamodule", None)
        return self.num_classes or getattr(datamodule, "num_train_classes", None) or self._known_num_classes(trainer)

    def _match_classes(self, trainer: Trainer, size: int) -> Tensor:
        """The classifier's class of each label of evaluation, -1 where it has none."""
        datamodule = getattr(trainer, "datamodule", None)
        names = getattr(datamodule, "class_names", None)
        if self.class_names is None or names is None:
            known = self._num_train_classes(trainer)
            return torch.arange(size) if known in (None, size) else torch.tensor([-1])
        coarse = getattr(datamodule, "coarse", None)
        groups = coarse.items() if isinstance(coarse, dict) and list(coarse) == self.class_names else ()
        group_of = {member: group for group, members in groups for member in members}
        index = {name: label for label, name in enumerate(self.class_names)}
        return torch.tensor([index.get(group_of.get(str(name), str(name)), -1) for name in names])

    def _training_head(self, trainer: Trainer, embeddings: Tensor, labels: Tensor) -> nn.Linear:
        """The classifier of the classes of training; created, restored or enlarged as required."""
        head, dim, known = self._head_on(embeddings.device), embeddings.shape[1], self._num_train_classes(trainer)
        names = _training_names(trainer, known)
        other_names = None not in (names, self.class_names) and names != self.class_names
        if head is not None and (other_names or known not in (None, head.out_features) or dim != head.in_features):
            self._tell_once(
                f"OnlineProbe starts anew: that of the checkpoint was trained on {head.out_features} other classes, or "
                f"on embeddings of other than {dim} dimensions"
            )
            head = None
        size = known
        if size is None:  # the labels of all processes determine it
            largest = int(labels.max()) + 1 if len(labels) else 1
            size = largest_over_ranks(max(largest, 1 if head is None else head.out_features), embeddings.device)
        if head is None:
            self.class_names = names
            return self._build(size, dim, embeddings.device, {})
        return head if head.out_features == size else self._build(size, dim, embeddings.device, self.state_dict())

    def _head_on(self, device: torch.device) -> nn.Linear | None:
        """The classifier on a device, restored if need be; None if there is none yet."""
        if self.head is not None and self.head.weight.device == device:
            return self.head
        state = self.state_dict()
        if not state:
            return None
        size, dim = state["head"]["weight"].shape
        self.class_names = state.get("class_names")
        return self._build(size, dim, device, state)

    def _build(self, size: int, dim: int, device: torch.device, state: dict[str, Any]) -> nn.Linear:
        """A classifier of ``size`` classes with the weights and the optimizer of a state, zeros for further classes."""

        def padded(value: Tensor) -> Tensor:
            return torch.cat([value, value.new_zeros(size - len(value), *value.shape[1:])]) if value.ndim else value

        # skip_init, because random weights would advance the generator that the encoder's training uses
        options: dict[str, Any] = {"dtype": torch.float32, "device": device}
        self.head, self._state = nn.utils.skip_init(nn.Linear, dim, size, **options), {}
        self._optimizer = torch.optim.Adam(self.head.parameters(), lr=self.lr, fused=device.type != "mps")
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)
        if state:
            self.head.load_state_dict({name: padded(value) for name, value in state["head"].items()})
            moments = state["optimizer"]["state"].items()
            padded_moments = {index: {name: padded(value) for name, value in each.items()} for index, each in moments}
            self._optimizer.load_state_dict({**state["optimizer"], "state": padded_moments})
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


def _training_names(trainer: Trainer, num_classes: int | None) -> list[str] | None:
    """Names of the classes of training, if the data module has one for each."""
    datamodule = getattr(trainer, "datamodule", None)
    names = getattr(datamodule, "train_class_names", None) or getattr(datamodule, "class_names", None)
    return None if names is None or len(names) != num_classes else [str(name) for name in names]


def _directions(embeddings: Tensor) -> Tensor:
    """Embeddings scaled to the norm sqrt(D), so that the mean square of the entries is 1; float32 (N, D)."""
    return nn.functional.normalize(embeddings.float(), dim=1).mul_(embeddings.shape[1] ** 0.5)
