"""The report's parts: what the collector keeps, the words of the table, the page as a browser would parse it."""

import base64
import io
import json
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
from simo_lightning.report import (
    Contents,
    EmbeddedImages,
    EmbeddingCollector,
    MetricRow,
    load_record,
    make_contents,
    metric_groups,
    metric_rows,
    write_page,
    write_report,
)
from simo_lightning.report.collector import as_pixels
from simo_lightning.report.pictures import choose_queries
from simo_lightning.report.thumbnails import make_sprite

NASTY = '<b>&"'
NAMES = [NASTY, "$$", "_" + os.fsdecode(b"caf\xe9\0\n")]


class Page(HTMLParser):
    """Elements of a page, and its text without scripts and styles."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.inside = ""
        self.path = path
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts.append(data)
        elif self.inside != "style":
            self.texts.append(data.strip())

    @property
    def markup(self) -> str:
        """The source without what the library and its data hold."""
        text = self.source
        for script in self.scripts:
            text = text.replace(script, "")
        return text

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
    """The figures of a page, decoded; each must bring its own bytes."""
    found = []
    for image in page.all("img"):
        if "height" not in image:  # a photograph in a row
            continue
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
    assert len(pictures(page)) == 4  # shares, spectrum and norms; matrix and map are drawn by the browser
    assert [tag for tag, _ in page.elements if tag in ("link", "iframe", "object", "base")] == []
    policy = page.all("meta")[-1]
    assert policy["http-equiv"] == "Content-Security-Policy"
    assert (policy["content"] or "").startswith("default-src 'none'; ")
    assert "http" not in (policy["content"] or "")
    for tag, attributes in page.elements:
        for name in {"src", "href", "srcset", "poster", "data", "action"} & attributes.keys():
            assert (attributes[name] or "").startswith(("data:", "#section-")), (tag, name)
    for word in ("http:", "https:", "file:", "@import", str(page.path.parent), str(Path.home())):
        assert word not in page.markup, word
    assert all(each.startswith('"data:') for each in page.markup.split("url(")[1:])


def test_the_page_can_be_read_by_everyone(page: Page):
    assert page.all("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    assert len(page.all("title")) == 1
    levels = [int(tag[1]) for tag, _ in page.elements if tag in ("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    alts = [image["alt"] or "" for image in page.all("img")]
    assert all(len(alt) > 5 for alt in alts)
    figures = [image["alt"] or "" for image in page.all("img") if "height" in image]
    assert all(len(alt) > 20 for alt in figures)
    assert len(set(figures)) == len(figures)
    assert {cell["scope"] for cell in page.all("th")} == {"col", "row"}


def test_names_are_escaped(page: Page):
    scripts = [script for script in page.all("script")]
    assert scripts == [{"type": "application/json", "id": "report-data"}, {}, {}]
    assert "<" not in page.scripts[0]
    alts = " ".join(image["alt"] or "" for image in page.all("img"))  # as the parser undoes it
    names = json.loads(page.scripts[0])["names"]
    assert names == [NASTY, "$$", r"_caf\udce9\x00"]
    assert all(name in alts for name in names)
    assert len(page.all("b")) == 5  # the numbers at the top
    assert page.after("Config") == rf"{NASTY}</title><script>\udcff"


def test_the_page_is_valid_html(page: Page):
    """The rules of HTML that a template can break: elements nest and end, attributes and ids occur once."""
    assert page.source.startswith("<!DOCTYPE html>\n<html lang=")
    Nesting().check(page.markup)
    assert not any(character in page.markup for character in map(chr, [*range(9), 11, 12, *range(14, 32), 127]))
    assert page.source.encode("utf-8").decode("utf-8") == page.source


def test_without_names_images_and_a_second_class():
    data = Data(images=False, named=False)
    data.set = TensorDataset(data.set.tensors[0], torch.zeros(24, dtype=torch.long))
    page = plot(Foreign(), data)
    assert page.after("Images") == "24 of 1 classes"
    assert "Nearest neighbours" not in page.texts
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
    assert page.all("details").count({"open": None}) == 1
    assert any(text.startswith("Star coordinates: each class has an axis") for text in page.texts)


def contents_of(folder: Path, data: EmbeddedImages, num_classes: int, **named) -> Contents:
    moments = class_moments(data.embeddings, data.labels, num_classes)
    names = [f"class {index}" for index in range(num_classes)]
    return make_contents(folder, data, moments, names, metric_rows(moments), **named)


def test_training_is_shown_in_the_principal_plane_where_a_class_has_no_kept_mean(tmp_path: Path):
    labels, rows = torch.arange(1_002) % 501, torch.randn(1_002, 4, generator=torch.Generator().manual_seed(0))
    moments = class_moments(rows, labels, 501)
    kept = [Snapshot.of_moments(epoch, epoch, moments, rows[:300], labels[:300]) for epoch in range(2)]
    training = contents_of(tmp_path, EmbeddedImages(rows, labels), 501, snapshots=kept, projections=["pca"]).sections
    assert training[-1].title == "Along training"
    points, cosines, moving = training[-1].pictures
    assert points.text == moving.text == "One map for all epochs: PCA of the last one."
    assert cosines.text.endswith("; 251 of 501 classes.")


def test_of_many_classes_a_map_shows_some_with_ten_points_each(tmp_path: Path):
    labels = torch.arange(1_600) % 400
    rows = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))[labels]
    rows = rows + 0.1 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(1))
    contents = contents_of(tmp_path, EmbeddedImages(rows, labels), 400, max_points=500, projections=["pca"])
    assert [section.title for section in contents.sections] == [
        "Similarity of the classes",
        "Map",
        "Metrics",
        "Recall of each class",
        "Orthogonal shares",
        "Use of dimensions",
        "Norms",
    ]
    (pca,) = contents.sections[1].pictures
    assert pca.alt.startswith("PCA of 200 of 1,600 embeddings 50 of 400 classes: map of 200 embeddings of 50 classes")
    assert sorted(contents.order.tolist()) == list(range(400))  # the matrix has all classes
    assert len(contents.sections[3].table.rows) == 400
    write_page(tmp_path, "t", {}, contents)
    page = Page(tmp_path / "index.html")
    assert page.path.stat().st_size < 10e6
    assert len(json.loads(page.scripts[0])["matrix"]["order"]) == 400
    assert "390 more" in page.texts


def test_the_rows_of_images_are_those_of_the_embeddings(tmp_path: Path):
    """Six tight classes at right angles; one image lies in another class, and two images are copies."""
    labels = torch.arange(60) % 6
    generator = torch.Generator().manual_seed(0)
    rows = torch.eye(6)[labels] + 0.02 * torch.randn(60, 6, generator=generator)
    images = torch.randint(0, 256, (60, 3, 16, 16), generator=generator, dtype=torch.uint8)
    rows[13] = torch.eye(6)[4]  # labelled 1
    images[7], rows[7] = images[31], rows[31]  # both labelled 1
    data = EmbeddedImages(rows, labels, images)
    contents = contents_of(tmp_path, data, 6, projections=["pca"], queries=3)
    sections = {section.title: section for section in contents.sections}
    (suspect,) = sections["Likely wrong labels"].strips
    assert suspect.title == "Labelled class 1"
    assert suspect.text.startswith("Perhaps class 4: 100 % of the neighbours, 0 % its label")
    assert suspect.shots[0].alt == "Query: class 1, image 13"
    assert {shot.name for shot in suspect.shots[1:]} == {"class 4"}
    assert {shot.kind for shot in suspect.shots[1:]} == {"wrong"}
    (copies,) = sections["Near duplicates"].strips
    assert copies.text == "Correlation of the pixels 1.00, cosine of the embeddings 1.00."
    assert [shot.note for shot in copies.shots] == ["image 7", "image 31"]
    (confused, *_) = sections["Most confused classes"].strips
    assert confused.title == "class 1 and class 4"
    nearest = sections["Nearest neighbours"].strips
    assert [strip.title for strip in nearest] == ["class 0", "class 2", "class 4"]  # spread over the classes
    table = sections["Recall of each class"].table
    rows_of = {row[0]: [*row, note] for row, note in zip(table.rows, table.notes, strict=True)}
    # of class 1, nine images find 8 of their 9 others and one none: 0.9 * 8 / 9
    assert rows_of["class 1"] == ["class 1", "0.90", "0.80", "10", "most often taken for class 4 (1)"]
    assert rows_of["class 5"] == ["class 5", "1.00", "1.00", "10", ""]


def test_of_many_images_every_nth_is_kept_over_the_whole_split():
    labels = torch.arange(50)
    collector = EmbeddingCollector(max_images=8)
    for part in labels.split(9):
        images = part.view(-1, 1, 1, 1).expand(-1, 1, 2, 2).to(torch.uint8)
        collector.update(trainer(), part.float().view(-1, 1), part, (images, part), (0, 0))
    collector.compute(trainer(), Foreign(), "val")
    result = collector.result
    assert result is not None
    assert result.pictured.tolist() == [0, 8, 16, 24, 32, 40, 48]
    assert result.images[:, 0, 0, 0].tolist() == result.pictured.tolist()
    assert len(result.embeddings) == 50


def test_the_record_holds_the_numbers_of_the_page(page: Page):
    record = load_record(page.path.parent)
    assert record.class_names == NAMES
    assert record.stage == "val"
    assert [f"{row.value:.4g}" for row in record.rows if row.name == "rms_norm"] == [page.value("rms_norm")]
    assert math.isnan(next(row.value for row in record.rows if row.name == "knn"))
    assert sorted(record.points) == ["pca", "tsne"]
    assert record.points["pca"].shape == (24, 2)
    assert len(record.headline) == 5
    assert record.headline[0].name == "MAP@R"


@pytest.mark.parametrize("damage", [b"{", b"[]", b'{"format": 2}'])
def test_a_damaged_record_is_reported(page: Page, damage: bytes, tmp_path: Path):
    (tmp_path / "report.json").write_bytes(damage)
    with pytest.raises(ValueError, match=r"report\.json must be a file that simo plot wrote"):
        load_record(tmp_path)


def test_a_sprite_has_every_image_in_its_place():
    images = torch.zeros(7, 3, 16, 16, dtype=torch.uint8)
    for index in range(7):
        images[index] = 36 * index
    sprite = make_sprite(images)
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(sprite.uri.partition(",")[2]))))
    assert picture.shape == (sprite.rows * sprite.height, sprite.columns * sprite.width, 3)
    for index in range(7):
        row, column = divmod(index, sprite.columns)
        middle = picture[row * 16 + 8, column * 16 + 8].astype(int)
        assert abs(middle - 36 * index).max() < 8  # lossy


def test_a_sprite_keeps_to_its_bytes():
    images = torch.randint(0, 256, (300, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    sprite = make_sprite(images, most_bytes=300_000)
    assert sprite.width < 64
    assert len(sprite.uri) <= 300_000


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


def test_queries_take_the_classes_in_turn():
    labels = torch.tensor([2, 2, 0, 2, 0, 5])
    assert choose_queries(labels, 5).tolist() == [2, 0, 5, 4, 1]
    assert choose_queries(labels, [3, 3]).tolist() == [3, 3]
    assert choose_queries(labels, 0).tolist() == []
    assert choose_queries(torch.arange(9).repeat(2), 3).tolist() == [0, 3, 6]
    assert choose_queries(labels, 100).tolist() == [2, 0, 5, 4, 1, 3]


def test_every_metric_has_a_direction_and_a_meaning():
    moments = class_moments(torch.eye(4), torch.tensor([0, 0, 1, 1]), 2)
    rows = metric_rows(moments, knn=0.5, k=7, retrieval={"recall_at_1": 0.5, "map_at_r_macro": 0.25})
    assert [row.name for row in rows] == ["knn", "recall_at_1", "map_at_r_macro", *sorted(GEOMETRY)]
    groups = metric_groups(rows)
    assert [group.title for group in groups] == [
        "Retrieval and kNN",
        "Class directions",
        "Use of dimensions",
        "Norms and spread",
    ]  # every declared metric has a group
    assert sorted(row.name for group in groups for row in group.rows) == sorted(row.name for row in rows)
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
    path = write_page(Path(), "t", {"Config": "c"}, Contents())
    assert path == Path("index.html")
    assert pictures(Page(path)) == []


def test_the_matrix_leaves_out_classes_without_images(tmp_path: Path):
    labels = 2 * (torch.arange(48) % 12)  # every second of 24 classes
    rows = torch.eye(12)[labels // 2] + 0.1 * torch.randn(48, 12, generator=torch.Generator().manual_seed(0))
    contents = contents_of(tmp_path, EmbeddedImages(rows, labels), 24, projections=["pca"])
    assert sorted(contents.order.tolist()) == list(range(0, 24, 2))
    assert contents.sections[0].pictures[0].alt.startswith("Cosines between the means of 12 classes")


def test_without_bokeh_the_page_has_the_static_figures_and_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("simo_lightning.report.contents.has_bokeh", lambda: False)
    labels = torch.arange(24) % 3
    rows = torch.eye(3)[labels] + 0.1 * torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
    contents = contents_of(tmp_path, EmbeddedImages(rows, labels), 3, projections=["pca"])
    page = Page(write_page(tmp_path, "t", {}, contents))
    assert page.all("script") == []
    assert len(pictures(page)) == 6  # similarity, map, two of shares, spectrum, norms
    assert "pip install 'simo_lightning[report]' makes the map interactive." in page.texts
    assert page.path.stat().st_size < 1e6


def test_the_matrix_of_very_many_classes_shows_every_nth(tmp_path: Path) -> None:
    rows = torch.randn(1500, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(1500)
    moments = class_moments(rows, labels, 1500)
    names = [f"class {label}" for label in range(1500)]
    contents = make_contents(
        tmp_path, EmbeddedImages(rows, labels), moments, names, metric_rows(moments), projections=()
    )
    assert sorted(contents.order.tolist()) == list(range(0, 1500, 2))
    assert "750 of 1,500 classes" in contents.sections[0].text


def test_metrics_above_the_budget_have_no_row_and_the_page_says_why(tmp_path: Path) -> None:
    labels, line = torch.arange(24) % 3, "not computed: subspace_overlap: too large"
    rows = torch.eye(3)[labels] + 0.1 * torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
    moments = class_moments(rows, labels, 3, second_budget_mb=0)
    names, table = ["a", "b", "c"], metric_rows(moments)
    assert not {row.name for row in table} & {"subspace_overlap", "variance_along", "variance_across"}
    data = EmbeddedImages(rows, labels)
    contents = make_contents(tmp_path, data, moments, names, table, projections=(), not_computed=line)
    page = Page(write_page(tmp_path, "t", {}, contents))
    assert any("Not computed: subspace_overlap: too large." in text for text in page.texts)
