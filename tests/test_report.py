"""The report's parts: what the collector keeps, the words of the table, the page as a browser would parse it."""

import base64
import io
import math
import os
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from simo_lightning.callbacks import EmbeddingPlots, OnlineKNN
from simo_lightning.data import DigitsPairDataModule
from simo_lightning.functional.geometry import GEOMETRY
from simo_lightning.functional.moments import class_moments
from simo_lightning.plotting import Snapshot, save_snapshot
from simo_lightning.report import MetricRow, metric_rows, write_page, write_report
from simo_lightning.report.collector import as_pixels
from simo_lightning.report.pictures import EmbeddedImages, choose_queries, draw_sections, nearest_neighbors

NASTY = '<b>&"'
NAMES = [NASTY, "$$", "_" + os.fsdecode(b"caf\xe9\0\n")]


class Page(HTMLParser):
    """Elements of a page, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.path = path
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data.strip())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def after(self, text: str) -> str:
        """The first text after a text."""
        return next(filter(None, self.texts[self.texts.index(text) + 1 :]))

    def value(self, metric: str) -> str:
        """Of the table: the text two after the name, past the meaning."""
        found = [text for text in self.texts[self.texts.index(metric) :] if text]
        return found[2]


class Nesting(HTMLParser):
    """Raises where an element is not closed in its place, or an attribute occurs twice."""

    VOID = ("meta", "img", "br", "hr", "input", "link")

    def check(self, source: str) -> None:
        self.open: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert len({name for name, _ in attrs}) == len(attrs), (tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag


class Foreign(pl.LightningModule):
    """A module that is not ours: no ``embed``, and steps that return a dictionary, or something else."""

    def __init__(self, returns: bool = True) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 3)
        self.returns = returns

    def validation_step(self, batch, batch_idx):
        embeddings = self.layer(batch[0].flatten(1))
        return {"embeddings": embeddings, "labels": batch[1]} if self.returns else embeddings.sum()

    test_step = validation_step


class Data(pl.LightningDataModule):
    """A data module that is not ours, of images 2 x 2 RGB or of plain vectors."""

    def __init__(self, images: bool = True, named: bool = True) -> None:
        super().__init__()
        rows = torch.randn(24, 3, 2, 2, generator=torch.Generator().manual_seed(0))
        self.set = TensorDataset(rows if images else rows.flatten(1), torch.arange(24) % 3)
        if named:
            self.class_names = NAMES

    def val_dataloader(self):
        return DataLoader(self.set, batch_size=10)

    test_dataloader = val_dataloader


def trainer(**named) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(accelerator="cpu", **quiet, **named)


def plot(module: pl.LightningModule, data: pl.LightningDataModule, **named) -> Page:
    return Page(write_report(trainer(), module, data, ckpt_path=None, out="out", **{"projections": ["pca"], **named}))


def pictures(page: Page) -> list[Image.Image]:
    """Every picture of a page, decoded; each must bring its own bytes."""
    found = []
    for image in page.all("img"):
        head, _, code = (image["src"] or "").partition(";base64,")
        found.append(Image.open(io.BytesIO(base64.b64decode(code, validate=True))))
        found[-1].load()
        assert head == f"data:{found[-1].get_format_mimetype()}"
        assert (image["width"], image["height"]) == tuple(map(str, found[-1].size))
    return found


def snapshots(folder: Path, num_classes: int = 3, count: int = 3) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(12) % num_classes
    for epoch in range(count):
        points = torch.randn(12, 4, generator=generator)
        means = class_moments(points, labels, num_classes).means.float()
        save_snapshot(Snapshot(epoch, 10 * epoch, torch.bincount(labels), means, points, labels), folder)


@pytest.fixture(scope="module")
def seeded() -> Foreign:
    torch.manual_seed(0)
    return Foreign()


@pytest.fixture(scope="module")
def page(seeded: Foreign, tmp_path_factory: pytest.TempPathFactory) -> Page:
    """Of a module, data and class names that are not ours."""
    out = str(tmp_path_factory.mktemp("page"))
    config_name = f"{NASTY}</title><script>" + os.fsdecode(b"\xff")
    return Page(write_report(trainer(), seeded, Data(), None, out, config_name=config_name))


def test_a_foreign_module_gets_a_page_with_its_own_numbers(page: Page, seeded: Foreign):
    rows, labels = Data().set.tensors
    moments = class_moments(seeded.layer(rows.flatten(1)).detach(), labels, 3)
    for name, function in GEOMETRY.items():
        assert float(page.value(name)) == pytest.approx(float(function(moments)), rel=6e-4), name
    assert page.value("knn") == "undefined"
    assert page.after("Images") == "24 of 3 classes"
    assert page.after("Checkpoint") == "none: current weights"
    assert page.after("Data") == "Data, validation split"


def test_the_page_stands_alone(page: Page):
    assert len(pictures(page)) == 6  # similarity, norms, PCA, t-SNE, spectrum, neighbours
    assert [tag for tag, _ in page.elements if tag in ("script", "link", "iframe", "object", "base")] == []
    for tag, attributes in page.elements:
        for name in {"src", "href", "srcset", "poster", "data", "action"} & attributes.keys():
            assert (attributes[name] or "").startswith("data:"), (tag, name)
    for word in ("http:", "https:", "file:", "url(", "@import", str(page.path.parent), str(Path.home())):
        assert word not in page.source, word


def test_the_page_can_be_read_by_everyone(page: Page):
    assert page.all("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    assert len(page.all("title")) == 1
    levels = [int(tag[1]) for tag, _ in page.elements if tag in ("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    alts = [image["alt"] or "" for image in page.all("img")]
    assert all(len(alt) > 20 for alt in alts)
    assert len(set(alts)) == len(alts)
    assert {cell["scope"] for cell in page.all("th")} == {"col", "row"}


def test_names_are_escaped(page: Page):
    assert page.all("b") == page.all("script") == []
    alts = " ".join(image["alt"] or "" for image in page.all("img"))  # as the parser undoes it
    for shown in (NASTY, r"_caf\udce9\x00"):
        assert shown in alts
    assert page.after("Config") == rf"{NASTY}</title><script>\udcff"


def test_the_page_is_valid_html(page: Page):
    """The rules of HTML that a template can break: elements nest and end, attributes and ids occur once."""
    assert page.source.startswith("<!DOCTYPE html>\n<html lang=")
    Nesting().check(page.source)
    assert not any(character in page.source for character in map(chr, [*range(9), 11, 12, *range(14, 32), 127]))
    assert page.source.encode("utf-8").decode("utf-8") == page.source


def test_without_names_images_and_a_second_class():
    data = Data(images=False, named=False)
    data.set = TensorDataset(data.set.tensors[0], torch.zeros(24, dtype=torch.long))
    page = plot(Foreign(), data)
    assert page.after("Images") == "24 of 1 classes"
    assert "Nearest neighbours" not in page.texts
    assert not Path("out/neighbors.png").exists()
    assert page.value("class_cosine") == "undefined"
    assert float(page.value("rms_norm")) > 0
    assert "nan" not in page.texts


def test_training_is_shown_where_the_run_kept_snapshots():
    snapshots(Path("plots/snapshots"), num_classes=2)  # of another data set: nothing to show beside this one
    assert "Along training" not in plot(Foreign(), Data()).texts
    snapshots(Path("plots/snapshots"))
    page = plot(Foreign(), Data())
    assert "Along training" in page.texts
    moving = [picture for picture in pictures(page) if picture.format == "GIF"]
    assert [getattr(picture, "n_frames", 1) for picture in moving] == [3]
    assert len(page.all("details")) == 1
    assert any(text.startswith("Star coordinates: each class has an axis") for text in page.texts)


def test_training_is_shown_in_the_principal_plane_where_a_class_has_no_kept_mean(tmp_path: Path):
    labels, rows = torch.arange(1_002) % 501, torch.randn(1_002, 4, generator=torch.Generator().manual_seed(0))
    moments = class_moments(rows, labels, 501)
    kept = [Snapshot.of_moments(epoch, epoch, moments, rows[:300], labels[:300]) for epoch in range(2)]
    names = [f"class {index}" for index in range(501)]
    training = draw_sections(tmp_path, EmbeddedImages(rows, labels), moments, names, kept, ["pca"])[-1]
    assert training.title == "Along training"
    points, cosines, moving = training.pictures
    assert points.text == moving.text == "One map for all epochs: PCA of the last one."
    assert cosines.text.endswith("; 251 of 501 classes.")


def test_of_a_thousand_classes_a_map_shows_some_with_ten_points_each(tmp_path: Path):
    labels = torch.arange(20_000) % 1_000
    rows = torch.randn(1_000, 8, generator=torch.Generator().manual_seed(0))[labels]
    rows = rows + 0.1 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(1))
    class_names = [f"class {index}" for index in range(1_000)]
    moments = class_moments(rows, labels, 1_000)
    sections = draw_sections(tmp_path, EmbeddedImages(rows, labels), moments, class_names, max_points=500)
    assert [section.title for section in sections] == ["Classes", "Maps", "Dimensions"]
    (pca, tsne) = sections[1].pictures
    expected = "of 500 of 20,000 embeddings 50 of 1,000 classes: map of 500 embeddings of 50 classes"
    assert pca.alt.startswith(f"PCA {expected}")
    assert tsne.alt.startswith(f"t-SNE {expected}")
    assert int(tsne.alt.split("; ")[1].split(" %")[0]) > 90  # the classes are tight


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"stage": "train"}, "stage must be 'val' or 'test', got 'train'"),
        ({"projections": ["lda"]}, "projections must be among pca, tsne, umap, got 'lda'"),
        ({"max_points": 0}, "max_points must be at least 1, got 0"),
        ({"queries": -1}, "queries must be a number >= 0"),
        ({"queries": [3, 24]}, r"queries must be indices 0..23 of images of the split, got \[3, 24\]"),
    ],
    ids=lambda value: "",
)  # fmt: skip
def test_wrong_arguments_are_reported(named, message):
    with pytest.raises(ValueError, match=message):
        plot(Foreign(), Data(), **named)


def test_steps_without_embeddings_are_reported():
    with pytest.raises(ValueError, match="Foreign's validation steps must return a dictionary with embeddings"):
        plot(Foreign(returns=False), Data())


def test_a_checkpoint_of_another_module_is_reported():
    torch.save({"state_dict": {"other": torch.zeros(1)}, "pytorch-lightning_version": pl.__version__}, "other.ckpt")
    with pytest.raises(ValueError, match=r"checkpoint other.ckpt does not fit the model"):
        write_report(trainer(), Foreign(), Data(), ckpt_path="other.ckpt")


def test_the_trainers_callbacks_are_restored():
    callbacks = [EmbeddingPlots(), OnlineKNN()]  # OnlineKNN itself would raise: there is no bank
    mine = trainer(enable_checkpointing=False, callbacks=callbacks)
    before = list(mine.callbacks)
    with pytest.raises(ValueError, match="queries must be"):
        write_report(mine, Foreign(), Data(), ckpt_path=None, queries=-1)
    assert mine.callbacks == before
    assert set(callbacks) <= set(before)


def test_pixels_are_those_of_the_data():
    data = DigitsPairDataModule(samples_per_class=10)
    data.setup("fit")
    raw, labels = next(iter(data.val_dataloader()))
    assert torch.equal(as_pixels(data.prepare((raw, labels), augment=False)[0], data), raw)
    assert torch.equal(as_pixels(raw), raw)


def test_large_images_are_kept_small():
    assert as_pixels(torch.rand(2, 3, 100, 200)).shape == (2, 3, 32, 64)


def test_neighbours_are_those_of_a_loop():
    embeddings = torch.randn(30, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    queries = torch.tensor([4, 0, 29])
    rows = embeddings.numpy()
    for query, found in zip(queries.tolist(), nearest_neighbors(embeddings, queries, 4).tolist(), strict=True):
        cosines = {
            other: rows[query] @ rows[other] / np.linalg.norm(rows[query]) / np.linalg.norm(rows[other])
            for other in range(30)
            if other != query
        }
        assert found == sorted(cosines, key=cosines.__getitem__, reverse=True)[:4]


def test_queries_take_the_classes_in_turn():
    labels = torch.tensor([2, 2, 0, 2, 0, 5])
    assert choose_queries(labels, 5).tolist() == [2, 0, 5, 4, 1]
    assert choose_queries(labels, [3, 3]).tolist() == [3, 3]
    assert choose_queries(labels, 0).tolist() == []
    assert choose_queries(labels, 100).tolist() == [2, 0, 5, 4, 1, 3]


def test_every_metric_has_a_direction_and_a_meaning():
    rows = metric_rows(class_moments(torch.eye(4), torch.tensor([0, 0, 1, 1]), 2), knn=0.5, k=7)
    assert [row.name for row in rows] == ["knn", *sorted(GEOMETRY)]
    assert {row.better for row in rows} == {"higher", "lower", "neither"}
    for row in rows:
        assert 10 < len(row.meaning) < 200, row
        assert not set("`\n\\") & set(row.meaning), row
    assert "7 nearest" in rows[0].meaning
    by_name = {row.name: row.meaning for row in rows}
    assert by_name["class_cosine"] == "Mean absolute cosine between class means (0: all class means are orthogonal)"


@pytest.mark.parametrize(
    ("value", "text"), [(math.nan, "undefined"), (math.inf, "infinite"), (0.0, "0"), (0.123456, "0.1235")]
)
def test_values_are_shown(value: float, text: str):
    assert MetricRow("m", value, "lower", "").text == text


def test_write_page_gives_the_file():
    path = write_page(Path(), "t", {"Config": "c"}, [], [])
    assert path == Path("index.html")
    assert pictures(Page(path)) == []
