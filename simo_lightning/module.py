"""SimOModule: trains an encoder with a contrastive loss."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, get_args

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.checkpoint import checkpoint

from simo_lightning.checkpoints import (
    CheckpointMixin,
    MemoryLimit,
    TrainingClasses,
    known_preprocessing,
    training_classes,
)
from simo_lightning.distributed import gather_rows, shard_weights, world_size
from simo_lightning.lightning_private import attached_trainer
from simo_lightning.losses import SimOLoss, configure_loss
from simo_lightning.losses.simo import Reduce
from simo_lightning.parameter_groups import ParameterGroups
from simo_lightning.preprocessing import Preprocessing, encoder_input
from simo_lightning.schedules import with_schedule
from simo_lightning.sharing import SharingMixin

Batch = tuple[Tensor, Tensor]


class SimOModule(SharingMixin, CheckpointMixin, pl.LightningModule):
    """Trains an encoder so that embeddings of one class align and those of different classes are orthogonal.

    All parts are passed in: a subclass overrides one method, a config replaces one part. Validation and test steps
    return ``{"embeddings": (N, D), "labels": (N,)}``, which the callbacks evaluate. Any trainer logs kNN and geometry
    after validation and test, with the callbacks of :func:`~simo_lightning.callbacks.default_callbacks`, unless
    ``default_callbacks`` is False.

    Args:
        encoder: Maps images ``(N, C, H, W)`` to embeddings ``(N, D)``.
        loss: ``(embeddings, labels) -> scalar``; SimOLoss by default, or any other, such as those of
            pytorch-metric-learning. If it has ``terms(embeddings, labels)``, each term is logged by its name. If it has
            ``configure(num_classes, embedding_dim)``, as :class:`~simo_lightning.losses.ConfigurableLoss` describes, a
            fit calls it before the optimizer is made.
        optimizer: Maps parameters to an optimizer.
        lr_scheduler: Maps an optimizer to a scheduler; None for a constant rate. A scheduler with a method
            ``set_total_steps``, such as OneCycle, gets the length of the run and steps once per batch; others step
            once per epoch.
        parameter_groups: Rates and weight decay of the backbone, the projector and the loss, such as
            ``ParameterGroups(backbone_lr_factor=0.1)``. None: the optimizer's own for all, but no weight decay for the
            parameters of the loss, such as class vectors and proxies.
        channels_last: Keep images and convolutions in the memory layout (N, H, W, C), which is faster on most hardware.
            The result is the same up to rounding.
        micro_batch_size: Images that are embedded at a time in training; None for the whole batch. This is gradient
            caching (GradCache, arXiv 2101.06983): the loss and its gradient are those of the whole batch over all
            processes, but only the activations of one micro-batch are in memory. Each micro-batch is embedded a second
            time in the backward pass, so a step costs one more forward pass. The batch is split into the fewest parts
            of nearly equal size. BatchNorm normalises each part by its own statistics and updates its running ones
            once per part; choose norm "layer" or "group" if the result must not depend on this size. Dropout draws the
            same masks in both passes.
        compile: Compile the encoder with ``torch.compile`` when a fit starts. Needs a C++ compiler, on a GPU Triton.
        preprocessing: How an image becomes the input of the encoder. Every checkpoint stores it, so that validation,
            prediction, export and :meth:`embed` treat images as training did. None, or a mean of None: the data module
            completes it when a fit starts, from its own arguments, the encoder's ``preprocessing`` (of pretrained
            weights), and the training images. It is then an attribute of this module, and binding: set it to None
            before a fit that reads its images otherwise.

        reduce: How several processes compute the loss of their global batch. "gather" gathers all embeddings, with any
            loss. "sums" adds up sums over each class, so that a process's time and bytes do not grow with the number of
            processes: only with a SimOLoss at the level centroid, class or group
            (:meth:`~simo_lightning.losses.SimOLoss.terms_over_ranks`). "auto": the one of fewer bytes. Value and
            gradient are the same up to rounding.

    Attributes:
        default_callbacks: Whether to add callbacks to the trainer that are missing there.
        classes: Names of the classes of training, from the data module, and the means of their embeddings, which
            :class:`~simo_lightning.callbacks.OnlineKNN` computes. A checkpoint stores the names, and the means if they
            are of its weights. None: not known.

    Raises:
        ValueError: If ``micro_batch_size`` is less than 1.

    Example:
        >>> from simo_lightning.encoders import ImageEncoder
        >>> from simo_lightning.preprocessing import Preprocessing
        >>> preprocessing = Preprocessing(32, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
        >>> encoder = ImageEncoder("resnet10", width=0.125, stem="small")
        >>> module = SimOModule(encoder, SimOLoss(form="log"), preprocessing=preprocessing)
        >>> module.embed(torch.zeros(2, 3, 40, 60, dtype=torch.uint8)).shape
        torch.Size([2, 16])

    Source:
        Gradient caching: Gao et al., arXiv 2101.06983. There the embeddings' gradients are stored between two explicit
        passes; here ``torch.utils.checkpoint`` repeats the forward pass inside autograd, so DDP, gradient scaling and
        accumulation see one backward pass.
    """

    default_callbacks: bool = True

    def __init__(
        self,
        encoder: nn.Module,
        loss: nn.Module | None = None,
        optimizer: OptimizerCallable = AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        channels_last: bool = False,
        micro_batch_size: int | None = None,
        compile: bool = False,
        preprocessing: Preprocessing | None = None,
        parameter_groups: ParameterGroups | None = None,
        reduce: Reduce = "auto",
    ) -> None:
        super().__init__()
        if reduce not in get_args(Reduce):
            raise ValueError(f"reduce must be one of {', '.join(get_args(Reduce))}, got {reduce!r}")
        if micro_batch_size is not None and micro_batch_size < 1:
            raise ValueError(f"micro_batch_size must be at least 1, or None for whole batches, got {micro_batch_size}")
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.encoder = encoder.to(memory_format=self.memory_format)
        self.loss = SimOLoss() if loss is None else loss
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.micro_batch_size = micro_batch_size
        self.compile_encoder = compile
        self.preprocessing = preprocessing
        self.loss_sizes: dict[str, int | None] | None = None  # what the loss was configured with
        self.parameter_groups = parameter_groups
        self.reduce = reduce
        self.classes: TrainingClasses | None = None
        self._step_of_class_means: int | None = None  # at which they were computed

    @property
    def backbone(self) -> nn.Module:
        """The encoder's backbone, by which Lightning's BackboneFinetuning finds it."""
        backbone: nn.Module = self.encoder.backbone  # type: ignore[assignment]
        return backbone

    def setup(self, stage: str) -> None:
        """Compile the encoder for a fit; the names of its weights stay. Take the names of the classes."""
        if self.compile_encoder and stage == "fit":
            self.encoder.compile()
        names = getattr(getattr(attached_trainer(self), "datamodule", None), "class_names", None)
        if stage == "fit" and names:
            self.classes = TrainingClasses([str(name) for name in names])

    def set_class_means(self, means: Tensor) -> None:
        """Set the means of the classes for the weights as they are.

        Args:
            means: Of the training embeddings at length 1, ``(C, D)``; nan for a class without images. Further classes
                of the data module have none.
        """
        names = [] if self.classes is None else self.classes.names
        names = names[: len(means)] + [str(label) for label in range(len(names), len(means))] + names[len(means) :]
        filled = means.new_full((len(names), means.shape[1]), torch.nan, dtype=torch.float32, device="cpu")
        filled[: len(means)] = means
        self.classes, self._step_of_class_means = TrainingClasses(names, filled), self.global_step

    def configure_model(self) -> None:
        """Give the loss the number of classes of training and the dimension of the embeddings; shard the weights.

        Under a strategy with a device mesh (ShardedStrategy, Lightning's ModelParallelStrategy) the encoder is sharded
        block by block (FSDP2), and the parameters of the loss together. Override it to shard otherwise.

        Raises:
            ValueError: If the mesh has several tensor-parallel processes, which need a division of layers of your own.
        """
        trainer = attached_trainer(self)
        if trainer is not None and trainer.state.fn == "fit":
            data, dimension = getattr(trainer, "datamodule", None), getattr(self.encoder, "embedding_dim", None)
            self._configure_loss(_number_of_classes(data), dimension)
        if self.device_mesh is not None:
            processes = self.device_mesh["tensor_parallel"].size()
            if processes > 1:
                raise ValueError(
                    "tensor_parallel_size must be 1, since the default configure_model shards weights over "
                    f"data-parallel processes only, got {processes}: use --trainer.strategy ShardedStrategy"
                )
            shard_weights(self.encoder, self.device_mesh["data_parallel"])
            shard_weights(self.loss, self.device_mesh["data_parallel"])

    def _configure_loss(self, num_classes: int | None, embedding_dim: int | None) -> None:
        configure_loss(self.loss, num_classes, embedding_dim)
        self.loss_sizes = {"num_classes": num_classes, "embedding_dim": embedding_dim}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the classes, and what the loss was configured with."""
        super().on_save_checkpoint(checkpoint)
        if self.classes is not None:
            of_these_weights = self._step_of_class_means == checkpoint.get("global_step")
            means = self.classes.means if of_these_weights else None
            checkpoint["simo_module"]["classes"] = {"names": self.classes.names, "means": means}
        if self.loss_sizes is not None:
            checkpoint["simo_module"]["loss_sizes"] = self.loss_sizes

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Configure the loss as it was, unless the data of this fit have configured it; take the classes."""
        self._loaded_step = checkpoint.get("global_step")
        stored = checkpoint.get("simo_module")
        classes = training_classes(checkpoint)
        if classes is not None and (self.classes is None or self.classes.names == classes.names):
            self.classes, self._step_of_class_means = classes, checkpoint.get("global_step")
        sizes = stored.get("loss_sizes") if isinstance(stored, dict) else None
        if sizes is not None and self.loss_sizes is None:
            sizes = _checked_sizes(sizes)
            with MemoryLimit(checkpoint.get("state_dict", {})):
                self._configure_loss(**sizes)
        super().on_load_checkpoint(checkpoint)

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings ``(N, D)`` of images ``(N, C, H, W)``, as :meth:`embed` but in the dtype of the encoder."""
        images = encoder_input(images, known_preprocessing(self), check_range=not self.training)
        embeddings: Tensor = self.encoder(images.to(self.dtype, memory_format=self.memory_format))
        return embeddings

    def embed(self, images: Tensor) -> Tensor:
        """Embeddings in float32 or better, as the loss and the metrics take them.

        Args:
            images: ``(N, C, H, W)``: uint8 of any size, which are resized and normalised by ``preprocessing``; or
                floats that already are, which are embedded as they are.

        Returns:
            ``(N, D)``.

        Raises:
            ValueError: If ``preprocessing`` is known and the images have another number of channels, or, outside of
                training, are floats that cannot be normalised; or if they are uint8 and it is not known.
        """
        embeddings = self(images)
        return embeddings if embeddings.dtype == torch.float64 else embeddings.float()

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Loss of the global batch, and this process's embeddings and labels for the callbacks."""
        images, labels = batch
        embeddings = self._embed_micro_batches(images)
        if self._reduces_sums():
            loss_of_all: Any = self.loss.terms_over_ranks
            terms = self._loss_terms(partial(loss_of_all, reduce=self.reduce), embeddings, labels)
        else:
            embeddings_of_all, labels_of_all = gather_rows(embeddings), gather_rows(labels)
            with self._draws_of_all_ranks(batch_idx):
                terms = self.loss_terms(embeddings_of_all, labels_of_all)
        first, *others = terms.values()
        loss = sum(others, first)
        if not loss.isfinite():
            raise ValueError(f"train/loss must be finite, got {float(loss.detach())} at step {self.global_step}")
        if self._is_reported(batch_idx):
            self.log("train/loss", loss, prog_bar=True)
            if len(terms) > 1:
                self.log_dict({f"train/loss_{name}": term for name, term in terms.items()})
        return {"loss": loss, "embeddings": embeddings.detach(), "labels": labels}

    @contextmanager
    def _draws_of_all_ranks(self, batch_idx: int) -> Iterator[None]:
        """Random numbers that are the same on every rank, for a loss or miner that draws any."""
        if world_size() == 1:
            yield
            return
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        mixed = int(np.random.SeedSequence((seed, self.current_epoch, batch_idx)).generate_state(1)[0])
        kind = self.device.type
        devices = [] if kind == "cpu" else [self.device]
        with torch.random.fork_rng(devices, device_type="cuda" if kind == "cpu" else kind):
            torch.default_generator.manual_seed(mixed)
            if devices:
                torch.get_device_module(self.device).manual_seed(mixed)
            yield

    def _is_reported(self, batch_idx: int) -> bool:
        """Whether a logger, the progress bar or a monitor reads this step's loss, since ``log`` takes 0.4 ms."""
        trainer: Any = attached_trainer(self)
        if trainer is None:  # called without a trainer
            return False
        every, step = trainer.log_every_n_steps, self.global_step + 1
        return batch_idx % 10 == 9 or trainer.is_last_batch or bool(every and step % every == 0)

    def _embed_micro_batches(self, images: Tensor) -> Tensor:
        """Embeddings ``(N, D)`` of a training batch; micro-batches are embedded again in the backward pass."""
        if self.micro_batch_size is None or len(images) <= self.micro_batch_size:
            return self.embed(images)
        parts = images.tensor_split(-(-len(images) // self.micro_batch_size))
        contexts = partial(_forward_contexts, self)
        return torch.cat([checkpoint(self.embed, part, use_reentrant=False, context_fn=contexts) for part in parts])

    def loss_terms(self, embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Terms of the loss by name, computed outside autocast. Their sum is minimised.

        Args:
            embeddings: Of the global batch, ``(N, D)``.
            labels: ``(N,)``.

        Returns:
            Scalars.

        Raises:
            ValueError: As the loss does, with the step.
        """
        if callable(getattr(self.loss, "terms", None)):
            return self._loss_terms(self.loss.terms, embeddings, labels)  # type: ignore[arg-type]
        return {"loss": self._loss_terms(self.loss, embeddings, labels)}

    def _loss_terms(self, loss: Callable[[Tensor, Tensor], Any], embeddings: Tensor, labels: Tensor) -> Any:
        """What a loss returns, outside autocast, with the step in its errors."""
        with torch.autocast(embeddings.device.type, enabled=False):
            try:
                return loss(embeddings, labels)
            except ValueError as error:
                raise ValueError(f"at step {self.global_step}: {error}") from error

    def _reduces_sums(self) -> bool:
        """Whether the loss may add up sums of all processes instead of gathering their embeddings."""
        if world_size() == 1 or self.reduce == "gather":
            return False
        # a subclass that computes the loss itself gets the global batch
        own = is_overridden("loss_terms", self, SimOModule) or not isinstance(self.loss, SimOLoss)
        own = own or any(is_overridden(name, self.loss, SimOLoss) for name in ("terms", "forward"))
        if own and self.reduce == "sums":
            raise ValueError(
                "reduce='sums' requires a SimOLoss whose terms are not overridden, nor loss_terms of the module, got "
                f"{type(self.loss).__name__} in {type(self).__name__}"
            )
        return not own

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Embeddings ``(N, D)`` and labels ``(N,)`` for the callbacks."""
        images, labels = batch
        return {"embeddings": self.embed(images), "labels": labels}

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """As :meth:`validation_step`."""
        return self.validation_step(batch, batch_idx)

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """As :meth:`validation_step`."""
        return self.validation_step(batch, batch_idx)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed the global generators by (seed, epoch, batch, rank), so that dropout is the same in a resumed run."""
        seed = os.environ.get("PL_GLOBAL_SEED")  # set by seed_everything and so by the command line
        if seed is not None:
            key = (int(seed), self.current_epoch, batch_idx, self.global_rank)
            mixed = int(np.random.SeedSequence(key).generate_state(1)[0])
            # torch.manual_seed queries every type of device, which takes 0.3 ms
            torch.default_generator.manual_seed(mixed)
            if self.device.type != "cpu":
                torch.get_device_module(self.device).manual_seed(mixed)

    def configure_callbacks(self) -> list[pl.Callback]:
        """Callbacks that log kNN and geometry, without those that the trainer has."""
        from simo_lightning.callbacks import default_callbacks  # takes as long to import as all the rest

        return default_callbacks(self.trainer) if self.default_callbacks else []

    def configure_optimizers(self) -> Any:
        """Optimizer of the parameters that require a gradient, in their groups, and its schedule."""
        groups = self.parameter_groups
        if groups is None and any(parameter.requires_grad for parameter in self.loss.parameters()):
            groups = ParameterGroups(norm_weight_decay=None)
        if groups is None:
            optimizer = self.optimizer(parameter for parameter in self.parameters() if parameter.requires_grad)
        else:
            optimizer = groups.optimizer(self.optimizer, self)
        return with_schedule(optimizer, self.lr_scheduler, self.trainer)

    def on_train_start(self) -> None:
        """Let everything in the optimizer require a gradient: a resumed BackboneFinetuning leaves the backbone out."""
        optimizers = self.trainer.optimizers
        for parameter in (
            each for optimizer in optimizers for group in optimizer.param_groups for each in group["params"]
        ):
            parameter.requires_grad_(True)


def _number_of_classes(data: Any) -> int | None:
    """Number of classes that a data module trains on; None if it does not say."""
    names = getattr(data, "train_class_names", None)
    number = getattr(data, "num_train_classes", None) if names is None else len(names)
    return getattr(data, "num_classes", None) if number is None else number


def _checked_sizes(sizes: Any) -> dict[str, int | None]:
    """Numbers from a file. Raises ValueError unless they are two positive integers or None."""
    names = {"num_classes", "embedding_dim"}
    sound = isinstance(sizes, dict) and sizes.keys() == names
    if not sound or not all(each is None or (type(each) is int and each >= 1) for each in sizes.values()):
        raise ValueError(f"loss_sizes of a checkpoint must hold {' and '.join(sorted(names))}, got {str(sizes)[:100]}")
    return dict(sizes)


def _forward_contexts(module: nn.Module) -> tuple[Any, Any]:
    """Contexts for the two forward passes of a micro-batch.

    The second pass starts from the same buffers as the first and its updates are discarded, so running statistics
    change once per micro-batch and both passes give the same result.
    """
    buffers: list[tuple[nn.Module, str, Tensor]] = []
    return _save_buffers(module, buffers), _with_saved_buffers(buffers)


@contextmanager
def _save_buffers(module: nn.Module, buffers: list[tuple[nn.Module, str, Tensor]]) -> Iterator[None]:
    for part in module.modules():
        buffers += [(part, name, buffer.clone()) for name, buffer in part.named_buffers(recurse=False)]
    yield


@contextmanager
def _with_saved_buffers(buffers: list[tuple[nn.Module, str, Tensor]]) -> Iterator[None]:
    current = [getattr(part, name) for part, name, _ in buffers]
    try:
        for part, name, saved in buffers:
            setattr(part, name, saved)
        yield
    finally:
        for (part, name, _), buffer in zip(buffers, current, strict=True):
            setattr(part, name, buffer)
