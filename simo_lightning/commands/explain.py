"""``simo explain``."""

from pathlib import Path

from simo_lightning.embedder import Embedder
from simo_lightning.explain import Explanation, explain, write_explanation
from simo_lightning.explain.page import about_shares, completeness
from simo_lightning.extras import import_extra
from simo_lightning.plotting import share_rows
from simo_lightning.plotting.canvas import printable
from simo_lightning.plotting.shares import percent

POSITIONAL = {"checkpoint": None, "image": None}
_BAR = 40  # characters of a share of 100 %
_FAR = 0.02  # error of integrated gradients above which more steps are advised


def run(
    checkpoint: str,
    image: str,
    against: str | None = None,
    class_name: str | None = None,
    gallery: str | None = None,
    out: str | None = None,
    k: int = 5,
    steps: int = 64,
    device: str = "auto",
) -> None:
    """Explain the embedding of an image.

    Args:
        checkpoint: Checkpoint of a trained model.
        image: Image file.
        against: Another image file: explain the similarity of the two.
        class_name: Explain the similarity to the mean of this class. Default: the nearest one.
        gallery: File that simo embed wrote, or a folder of images, in which the nearest images are found.
        out: Folder of the page and its pictures. Default: explained/FOLDER/NAME, after the image.
        k: Nearest images, at most.
        steps: Steps of integrated gradients; more are closer to the integral, and take longer.
        device: auto, cpu, cuda, ...
    """
    import_extra("captum")  # before the model is loaded
    embedder = Embedder.load(checkpoint, device=device)
    explanation = explain(embedder, image, against, class_name, gallery, checkpoint, k, steps)
    print("\n".join(printable_lines(explanation)))
    if gallery is None:
        print("nearest images: none without --gallery, a file that simo embed wrote or a folder of images")
    folder = Path("explained", Path(image).parent.name, Path(image).stem) if out is None else Path(out)
    print(f"pictures in {printable(str(write_explanation(explanation, folder)))}")


def printable_lines(explanation: Explanation) -> list[str]:
    """An explanation as text.

    Args:
        explanation: Of :func:`~simo_lightning.explain.explain`.

    Returns:
        Lines that can be printed.
    """
    lines = []
    for view in explanation.views:
        lines.append(f"{printable(view.name)}: cosine {view.cosine:.3f} with {printable(view.target)}")
        if view.shares is not None and explanation.classes is not None:
            rows = share_rows(*view.shares, explanation.classes.names)
            names = [printable(row.name) for row in rows]
            width = min(max(map(len, names)), 40)
            for name, row in zip(names, rows, strict=True):
                lines.append(f"  {name:{width}} {percent(row.value):>7} {'#' * round(_BAR * row.value)}".rstrip())
    if explanation.nearest:
        nearest = ", ".join(f"{printable(name)} {cosine:.3f}" for name, cosine in explanation.nearest)
        lines.append(f"nearest class means of {printable(explanation.views[0].name)}: {nearest}")
    lines.append(
        "no shares: the checkpoint holds no class means"
        if explanation.basis is None
        else f"shares: {about_shares(explanation.basis)}"
    )
    for view in explanation.views:
        lines.append(printable(completeness(view)))
        delta = view.integrated_gradients.delta
        if delta is not None and float(delta.abs()) > _FAR:
            lines.append("more --steps bring integrated gradients nearer to it")
    if explanation.views[0].grad_cam is None:
        lines.append("Grad-CAM: none, as the encoder is not convolutional")
    lines += [f"{each.cosine:8.4f}  {printable(each.path)}" for each in explanation.neighbors]
    return lines
