"""An explanation as pictures and as one HTML file that contains them."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from simo_lightning.explain.explanation import Explanation, View
from simo_lightning.functional.decomposition import OrthogonalBasis
from simo_lightning.plotting import attribution_figure, describe_attribution, describe_shares, shares_figure
from simo_lightning.plotting.canvas import printable
from simo_lightning.search.page import thumbnail


def write_explanation(explanation: Explanation, folder: str | Path) -> Path:
    """Write ``index.html``, which contains all pictures and loads nothing, and the pictures as PNG files beside it.

    Args:
        explanation: Of :func:`explain`.
        folder: Made if it is missing; files of these names are replaced.

    Returns:
        ``folder/index.html``; the pictures are ``attribution.png`` and, with class means, ``shares.png`` and
        ``shares_against.png`` of the other image.

    Raises:
        OSError: If a file cannot be written.
    """
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    views = explanation.views
    where = _attribution_figure(views)
    pictures = [_picture(where, folder / "attribution.png", " ".join(_where_text(view) for view in views))]
    for view, name in zip(views, ("shares.png", "shares_against.png"), strict=False):
        if view.shares is not None and explanation.classes is not None:
            names = explanation.classes.names
            figure = shares_figure(*view.shares, names, title=f"Shares of {printable(view.name)}")
            pictures.append(_picture(figure, folder / name, describe_shares(*view.shares, names)))
    neighbors = [(each, thumbnail(each.path)) for each in explanation.neighbors]
    environment = Environment(
        loader=PackageLoader("simo_lightning.explain", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,  # a macro gives Markup
    )
    page = environment.get_template("page.html").render(
        views=views,
        where=pictures[0],
        shares=pictures[1:],
        nearest=explanation.nearest,
        neighbors=neighbors,
        about_shares=None if explanation.basis is None else about_shares(explanation.basis),
        completeness=[completeness(view) for view in views],
    )
    path = folder / "index.html"
    path.write_text(page, encoding="utf-8")
    return path


def about_shares(basis: OrthogonalBasis) -> str:
    """How the shares of a model are to be read: how far its class means are from orthogonal, and whether any is left.

    Args:
        basis: Of the class means.

    Returns:
        One or two sentences.
    """
    classes, dim = int(basis.vectors.any(dim=1).sum()), basis.vectors.shape[1]
    if basis.rank == classes:
        text = (
            f"The means of {classes:,} classes are {float(basis.deviation):.2f} from orthogonal directions (root mean "
            "square)."
        )
    else:
        text = (
            f"The means of {classes:,} classes span {basis.rank:,} dimensions, so they cannot be orthogonal "
            f"({float(basis.deviation):.2f} from the nearest directions, root mean square), and the largest possible "
            f"share of a class is {100 * basis.rank / classes:.0f} % on average."
        )
    if basis.rank == dim:
        text += f" They span all {dim:,} dimensions: nothing can belong to no class."
    return text


def completeness(view: View) -> str:
    """What integrated gradients sum to, against the difference that they explain.

    Args:
        view: Of an explanation.

    Returns:
        One sentence.
    """
    result = view.integrated_gradients
    assert result.baseline_cosine is not None
    assert result.delta is not None
    cosine, baseline, delta = view.cosine, float(result.baseline_cosine), float(result.delta)
    return (
        f"Cosine of {view.name} with {view.target}: {cosine:.3f}; of a plain picture of the mean colour: "
        f"{baseline:.3f}. Integrated gradients sum to {cosine - baseline + delta:.3f}, {abs(delta):.3f} from the "
        f"difference of {cosine - baseline:.3f}."
    )


def _maps(view: View) -> list[torch.Tensor]:
    parts = [view.integrated_gradients, *([] if view.grad_cam is None else [view.grad_cam])]
    return [part.maps for part in parts]


def _names(view: View) -> list[str]:
    return ["integrated gradients", *([] if view.grad_cam is None else ["Grad-CAM"])]


def _attribution_figure(views: list[View]) -> Figure:
    images = torch.stack([view.pixels if len(view.pixels) in (1, 3) else view.pixels[:1] for view in views])
    maps = [torch.cat(each) for each in zip(*(_maps(view) for view in views), strict=True)]
    titles = [f"{printable(view.name)}\ncosine {view.cosine:.3f} with {printable(view.target)}" for view in views]
    return attribution_figure(images, maps, _names(views[0]), titles)


def _where_text(view: View) -> str:
    maps = [each.squeeze(0) for each in _maps(view)]
    return f"{view.name}, similarity to {view.target}. {describe_attribution(maps, _names(view))}"


def _picture(figure: Figure, path: Path, alt: str) -> dict[str, Any]:
    """Write a picture; its data and alternative text for the page."""
    figure.savefig(path)
    content = path.read_bytes()
    width, height = (int.from_bytes(content[start : start + 4], "big") for start in (16, 20))
    uri = f"data:image/png;base64,{base64.b64encode(content).decode('ascii')}"
    return {"uri": uri, "alt": alt, "width": width, "height": height}
