"""``simo share CHECKPOINT --out FOLDER``: a folder with a model card, and the Hub."""

from pathlib import Path

from simo_lightning.checkpoints import load_module
from simo_lightning.run_folder import run_folder_of
from simo_lightning.sharing import CardFields, SharingMixin

POSITIONAL: dict[str, str | None] = {"checkpoint": None}


def run(
    checkpoint: str,
    out: str,
    push: str | None = None,
    private: bool | None = None,
    license: str | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
    data: str | None = None,
    dataset: list[str] | None = None,
    run_dir: str | None = None,
    trusted: list[str] | None = None,
) -> None:
    """Write the folder, upload it if a name is given, and print where it is.

    Args:
        checkpoint: A checkpoint of a run, or a folder of this command.
        out: Folder to write: model.safetensors, config.json and the model card README.md. A README.md that is there
            already is kept, so that you can edit it before you upload.
        push: Name of the model on the Hugging Face Hub, such as name/model, to upload it; needs hf auth login.
        private: Whether a new repository on the Hub is private.
        license: Licence as the Hub abbreviates it, such as apache-2.0, cc-by-nc-4.0 or other.
        license_name: Name of the licence other.
        license_link: Address of the licence other.
        data: What the model was trained on, in words, for the card.
        dataset: Names of the training data on the Hub, for the card.
        run_dir: Folder of the run, for the metrics, data and recipe in the card. Default: that of the checkpoint.
        trusted: Import paths of classes or packages of your own that the checkpoint names.
    """
    folder = Path(out)
    if not Path(checkpoint).exists():
        raise FileNotFoundError(f"no checkpoint at {checkpoint}")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out must be a folder, got the file {out}")
    found = Path(run_dir) if run_dir is not None else run_folder_of(Path(checkpoint))
    card = CardFields(found, license, license_name, license_link, data, dataset or ())
    module = load_module(checkpoint, "cpu", trusted or ())
    if not isinstance(module, SharingMixin):
        raise ValueError(f"checkpoint {checkpoint} must be of a SimOModule to be shared, got {type(module).__name__}")
    kept = (folder / "README.md").exists()
    module.save_pretrained(folder, card, repo_id=push)
    sizes = {name: (folder / name).stat().st_size for name in ("model.safetensors", "config.json", "README.md")}
    print(f"written     {folder}: " + ", ".join(f"{name} ({size:,} bytes)" for name, size in sizes.items()))
    if kept:
        print("kept        README.md, which was there; remove it to have it written anew")
    elif license is None:
        print("note        the model card states no licence: pass --license, or edit README.md")
    if push is not None:
        commit = module.push_to_hub(push, (folder / "README.md").read_text(encoding="utf-8"), private)
        print(f"uploaded    {commit}")
