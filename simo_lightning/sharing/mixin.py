"""save_pretrained, from_pretrained and push_to_hub of a module."""

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from typing_extensions import Self

from simo_lightning.checkpoints import CONFIG_FILE, WEIGHTS_FILE, load_module
from simo_lightning.class_paths import Trusted, class_path
from simo_lightning.extras import import_extra
from simo_lightning.lightning_private import attached_trainer
from simo_lightning.sharing.card import CardFields
from simo_lightning.sharing.files import download_pretrained, pretrained_config
from simo_lightning.tensor_files import first_line

CARD_FILE = "README.md"


class SharingMixin:
    """Writes a trained module as a folder that others can load, or to the Hugging Face Hub; extra ``hub``.

    The folder holds plain data: ``model.safetensors`` (the weights, and the means of the classes), ``config.json`` (the
    class and its arguments, the preprocessing, the names of the classes, versions) and ``README.md``, the model card.
    ``Embedder.load``, :func:`~simo_lightning.checkpoints.load_encoder` and the ``simo``
    commands for a trained model take it in place of a checkpoint.
    """

    _step_of_class_means: int | None = None
    _loaded_step: int | None = None  # of the checkpoint that the weights are from

    def save_pretrained(
        self, save_directory: str | Path, card: CardFields | None = None, repo_id: str | None = None
    ) -> Path:
        """Write the module as a folder. A README.md that is there already is kept, everything else is replaced.

        Args:
            save_directory: The folder; it is created.
            card: What the model card says; None: what the module tells of itself.
            repo_id: Name of the model on the Hub, for the code in the card; None: the name of the folder.

        Returns:
            The folder.

        Raises:
            ImportError: If the extra ``hub`` is not installed.
            ValueError: If an argument of the module cannot be written as JSON; then nothing is written.

        Example:
            >>> from simo_lightning import ImageEncoder, Preprocessing, SimOModule
            >>> preprocessing = Preprocessing(32, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
            >>> module = SimOModule(ImageEncoder("resnet10", width=0.125, image_size=32), preprocessing=preprocessing)
            >>> folder = module.save_pretrained(getfixture("tmp_path") / "model")
            >>> sorted(path.name for path in folder.iterdir())
            ['README.md', 'config.json', 'model.safetensors']
            >>> SimOModule.from_pretrained(folder).preprocessing.image_size
            32
        """
        folder = Path(save_directory)
        model = self._hub_model(card, folder.resolve().name if repo_id is None else repo_id)
        folder.parent.mkdir(parents=True, exist_ok=True)
        # complete before anything is replaced: the library begins by removing config.json
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}_", dir=folder.parent) as complete:
            model.save_pretrained(complete)
            folder.mkdir(exist_ok=True)
            if not (folder / CARD_FILE).exists():
                os.replace(Path(complete, CARD_FILE), folder / CARD_FILE)
            for name in (WEIGHTS_FILE, CONFIG_FILE):
                os.replace(Path(complete, name), folder / name)
        return folder

    def push_to_hub(
        self,
        repo_id: str,
        card: CardFields | str | None = None,
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
        commit_message: str = "Upload the model",
    ) -> str:
        """Upload the module in one commit; the repository is created if there is none.

        Args:
            repo_id: Such as ``"name/model"``.
            card: What the model card says, or its whole text; None: what the module tells of itself.
            private: Whether a new repository is private; None: as the organisation has set, else public.
            token: None: that of ``hf auth login``.
            branch: None: the main one.
            create_pr: Whether to make a pull request.
            commit_message: Of the commit.

        Returns:
            Address of the commit.

        Raises:
            ImportError: If the extra ``hub`` is not installed.
            OSError: If the Hub cannot be reached or refuses the upload.
            ValueError: As :meth:`save_pretrained`.
        """
        model = self._hub_model(card, repo_id)
        try:
            commit: str = model.push_to_hub(
                repo_id,
                private=private,
                token=token,
                branch=branch,
                create_pr=create_pr,
                commit_message=commit_message,
            )
        except Exception as error:  # the library and its HTTP client raise many exception types
            kind = ValueError if isinstance(error, ValueError) else OSError
            raise kind(f"{repo_id!r} cannot be uploaded to the Hugging Face Hub: {first_line(error)}") from error
        return commit

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        map_location: Any = "cpu",
        trusted: Iterable[Trusted] | Trusted = (),
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        **kwargs: Any,
    ) -> Self:
        """Build the module of a folder or of a model on the Hub, in evaluation mode. Runs no code from the files.

        Args:
            pretrained_model_name_or_path: Folder that :meth:`save_pretrained` wrote, or a name on the Hub.
            map_location: Device of the weights.
            trusted: As in :meth:`~simo_lightning.checkpoints.CheckpointMixin.load_from_checkpoint`.
            revision: As the arguments that follow, of
                :func:`~simo_lightning.sharing.download_pretrained`.
            token: Of a private repository.
            cache_dir: Of the download.
            force_download: Whether to download again.
            local_files_only: Whether to read the cache alone.
            kwargs: Arguments of the module, which replace those in the file.

        Returns:
            The module; of the class that was saved, this one or a subclass.

        Raises:
            FileNotFoundError: If there is no such folder or model.
            ImportError: If safetensors, or for the Hub huggingface_hub, is not installed.
            ValueError: If a file is damaged, names a class that is not trusted, or does not fit; or if the module is of
                another class.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            if isinstance(pretrained_model_name_or_path, Path):
                raise FileNotFoundError(f"no folder {str(folder)!r}")
            folder = download_pretrained(
                pretrained_model_name_or_path,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
            )
        elif revision is not None:
            raise ValueError(f"revision must be None for the local folder {str(folder)!r}, got {revision!r}")
        if not (folder / CONFIG_FILE).is_file():
            raise FileNotFoundError(f"the folder {str(folder)!r} holds no {CONFIG_FILE}, as save_pretrained writes it")
        trusted = [trusted] if isinstance(trusted, Trusted) else list(trusted)
        built: Any = load_module(folder, map_location, [cls, *trusted], **kwargs)
        if not isinstance(built, cls):
            raise ValueError(f"{str(folder)!r} must hold a {class_path(cls)}, got a {class_path(type(built))}")
        evaluating: Self = built.eval()  # type: ignore[attr-defined]
        return evaluating

    def _hub_model(self, card: CardFields | str | None, repo_id: str) -> Any:
        import_extra("huggingface_hub")
        from simo_lightning.sharing.hub import HubModel

        assert isinstance(self, pl.LightningModule)
        trainer = attached_trainer(self)
        steps = trainer.global_step if trainer is not None else 0  # 0: that trainer has changed no weights
        config, weights = pretrained_config(self, steps or self._step_of_class_means)
        return HubModel(self, config, weights, card, repo_id, steps or self._loaded_step or None)
