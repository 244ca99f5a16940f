"""Any text can be the name of a class: figures are drawn and saved, and each name is read back from them."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.text import Text
from PIL import Image

from simo_lightning.functional.moments import class_moments
from simo_lightning.plotting import (
    class_similarity_figure,
    describe_neighbors,
    describe_norms,
    describe_scatter,
    describe_sequence,
    describe_similarity,
    neighbors_figure,
    norms_figure,
    save_animation,
    scatter_figure,
    small_multiples_figure,
)

# What a figure shows of a name, in at most 14 characters.
SHOWN = {
    "$$": "$$",
    "$": "$",
    r"\$5": r"\$5",
    r"$\frac{1}{$": r"$\frac{1}{$",
    "_private": "_private",
    "__": "__",
    r"50 % \alpha #1": r"50 % \alpha #1",
    "a^{b}~&c": "a^{b}~&c",
    "": "",
    "   ": "",
    "two\nlines": "two lines",
    "a\t b\r": "a b",
    "nul\x00": r"nul\x00",
    "bell\x07": r"bell\x07",
    os.fsdecode(b"caf\xe9"): r"caf\udce9",  # a file name in Latin-1
    "\u202eevil": r"\u202eevil",  # written from right to left from here on
    "a_very_long_name_of_a_class": "a_very_lon…ass",
    "n" * 100_000: "n" * 10 + "…nnn",
    "<b>&\"'": "<b>&\"'",
    "../../a/b": "../../a/b",
    "שלום": "שלום",
    "مرحبا": "مرحبا",
    "naïve ✓": "naïve ✓",
    "猫": r"\u732b",  # DejaVu Sans has no CJK glyphs
    "猫と犬": r"\u732b\u30…2ac",
    "\U0001f9ac": r"\U0001f9ac",
}


@pytest.fixture(autouse=True)
def bundled_font() -> Iterator[None]:
    with rc_context({"font.family": ["DejaVu Sans"]}):
        yield


def figures(names: list[str]) -> dict[str, Figure]:
    """Every figure with names."""
    labels = torch.arange(4 * len(names)) % len(names)
    rows = torch.randn(len(labels), 4, generator=torch.Generator().manual_seed(0))
    moments = class_moments(rows, labels, len(names))
    images = torch.zeros(len(names), 2, 1, 4, 4, dtype=torch.uint8)
    return {
        "similarity": class_similarity_figure(moments, names),
        "norms": norms_figure(moments, names),
        "scatter": scatter_figure(rows[:, :2], labels, names),
        "multiples": small_multiples_figure([("Epoch 0", rows), ("Epoch 1", rows)], labels, names),
        "neighbors": neighbors_figure(images, torch.arange(len(names)).unsqueeze(1).expand(-1, 2), names),
    }


@pytest.mark.parametrize("half", [0, 1])  # an axis names up to 25 classes
def test_names_are_drawn_literally_in_every_figure(tmp_path: Path, half: int):
    names = list(SHOWN)[half::2]
    for kind, figure in figures(names).items():
        figure.savefig(tmp_path / f"{kind}.png")
        with Image.open(tmp_path / f"{kind}.png") as image:
            assert image.size[0] == 800
        if kind in ("similarity", "norms"):
            drawn = figure.axes[0].get_yticklabels()
        elif kind in ("scatter", "multiples"):
            drawn = figure.legends[0].get_texts()
            assert len(figure.legends[0].legend_handles) == len(names)
        else:
            drawn = [axes.xaxis.label for axes in figure.axes[::2]]
        assert not any(text.get_parse_math() for text in drawn)
        for name, text in zip(names, drawn, strict=True):
            if kind != "neighbors" or "…" not in SHOWN[name]:  # there is more room below an image
                assert text.get_text() == SHOWN[name], kind
    expected = ["multiples.png", "neighbors.png", "norms.png", "scatter.png", "similarity.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == expected  # no name is part of a path


@pytest.mark.parametrize("name", SHOWN, ids=lambda value: ascii(value)[:20])
def test_a_name_is_described_in_printable_text(name: str):
    names = [name, "dog"]
    rows, labels = torch.eye(4), torch.tensor([0, 0, 1, 1])
    moments = class_moments(rows, labels, 2)
    described = [
        describe_similarity(moments, names),
        describe_norms(moments, names),
        describe_neighbors(torch.tensor([[0, 1]]), names),
        describe_scatter(rows[:, :2], labels, names, title=name),
        describe_sequence([(name, rows), ("end", rows)], labels, names),
    ]
    for text in described:
        assert text.isprintable()
        assert text.encode("utf-8")
    if name.isprintable() and name.strip() == name:
        assert all(name in text for text in described)


def test_many_classes_are_named_at_their_points_literally(tmp_path: Path):
    names = ["$$", "_x", *(f"$\\{index}$" for index in range(38))]
    points = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    figure = scatter_figure(points, torch.arange(40), names)
    figure.savefig(tmp_path / "scatter.png")
    drawn = figure.axes[0].texts
    assert len(drawn) > 10
    assert {text.get_text() for text in drawn} <= set(names)
    assert not any(text.get_parse_math() for text in drawn)


@pytest.mark.parametrize("title", ["$$", "50 %\n$\\frac{$", os.fsdecode(b"\xff"), "猫", "\x00"])
def test_titles_are_drawn_literally(tmp_path: Path, title: str):
    points, labels = torch.eye(2), torch.arange(2)
    scatter_figure(points, labels, ["a", "b"], title).savefig(tmp_path / "scatter.png")
    sequence = [(title, points), ("end", 2 * points)]
    small_multiples_figure(sequence, labels, ["a", "b"]).savefig(tmp_path / "multiples.png")
    save_animation(sequence, tmp_path / "moving.gif", labels, ["a", "b"])
    assert len(list(tmp_path.iterdir())) == 3


def test_names_are_literal_where_the_user_draws_with_tex():
    with rc_context({"text.usetex": True}):  # set only: drawing the numbers would need a TeX installation
        for figure in figures([r"50 % \alpha", "cat"]).values():
            named = [text for text in figure.findobj(Text) if r"\alpha" in text.get_text()]
            assert named
            assert not any(text.get_usetex() for text in named)


def test_a_font_of_the_users_setting_draws_what_the_first_one_lacks(tmp_path: Path):
    first, second = (set(get_font(findfont(FontProperties(family=[name]))).get_charmap()) for name in FONTS)
    character = next(chr(code) for code in sorted(second - first) if chr(code).isprintable())
    with rc_context({"font.family": FONTS}):
        figure = figures([character])["norms"]
        figure.savefig(tmp_path / "norms.png")  # a missing glyph would be a warning
    assert figure.axes[0].get_yticklabels()[0].get_text() == character
    assert figures([character])["norms"].axes[0].get_yticklabels()[0].get_text() == ascii(character)[1:-1]


FONTS = ["DejaVu Sans", "STIXGeneral"]
