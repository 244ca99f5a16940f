"""Attributions against closed forms, trained encoders and random weights; `simo explain` on real files."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy
from torchvision.models import convnext_tiny, densenet121, mobilenet_v3_small, vit_b_16

from simo_lightning import ImageEncoder, Preprocessing
from simo_lightning.checkpoints import TrainingClasses
from simo_lightning.cli import main
from simo_lightning.embedder import Embedder
from simo_lightning.explain import attribution, explain, last_feature_map, write_explanation
from simo_lightning.explain.page import about_shares
from simo_lightning.functional import orthogonal_basis
from simo_lightning.plotting import attribution_figure, describe_attribution
from tests.digits_run import SIMO

SIZE, PATCH = 32, 8


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def patches(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Noise with a red or a green patch at a random position, the class, and where the patch is."""
    random = generator(seed)
    images = 0.2 * torch.randn(count, 3, SIZE, SIZE, generator=random)
    labels = torch.randint(2, (count,), generator=random)
    corners = torch.randint(SIZE - PATCH + 1, (count, 2), generator=random).tolist()
    inside = torch.zeros(count, SIZE, SIZE, dtype=torch.bool)
    for index, (top, left) in enumerate(corners):
        inside[index, top : top + PATCH, left : left + PATCH] = True
        images[index, int(labels[index]), inside[index]] += 2.0
    return images, labels, inside


def small_encoder(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 8),
        )  # fmt: skip


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Tensor]:
    """An encoder that tells red from green patches by the cosine with a direction of each class, and the directions."""
    encoder, directions = small_encoder(), torch.eye(8)[:2]
    images, labels, _ = patches(512, seed=1)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=3e-3)
    for step in range(120):
        batch = torch.randint(512, (64,), generator=generator(step))
        cosines = cosine_similarity(encoder(images[batch]).unsqueeze(1), directions, dim=2)
        optimizer.zero_grad()
        cross_entropy(8 * cosines, labels[batch]).backward()
        optimizer.step()
    encoder.eval()
    tests, truth, _ = patches(200, seed=2)
    with torch.no_grad():
        predicted = cosine_similarity(encoder(tests).unsqueeze(1), directions, dim=2).argmax(dim=1)
    assert (predicted == truth).double().mean() > 0.95
    return encoder, directions


def inside_share(maps: Tensor, inside: Tensor) -> float:
    """Share of the positive part of the maps that lies inside the patches; by chance about (8 / 32)^2 = 0.0625."""
    positive = maps.clamp(min=0)
    return float((positive * inside).sum() / positive.sum())


@pytest.mark.parametrize(("method", "bound"), [("integrated_gradients", 0.45), ("grad_cam", 0.4)])
def test_the_patch_that_decides_the_class_is_found(trained, method: str, bound: float):
    encoder, directions = trained
    images, labels, inside = patches(20, seed=3)
    for label in (0, 1):
        chosen = labels == label
        result = attribution(encoder, images[chosen], directions[label], method)
        assert inside_share(result.maps, inside[chosen]) > bound


@pytest.mark.parametrize("method", ["integrated_gradients", "grad_cam"])
def test_random_weights_change_the_map(trained, method: str):
    encoder, directions = trained
    images, labels, inside = patches(20, seed=3)
    images, inside = images[labels == 0], inside[labels == 0]
    maps = attribution(encoder, images, directions[0], method).maps
    found, correlations = [], []
    for seed in range(5):
        other = attribution(small_encoder(seed + 1), images, directions[0], method).maps
        found.append(inside_share(other, inside))
        for one, another in zip(maps, other, strict=True):
            if another.any():  # Grad-CAM may find no part that raises the cosine
                correlations.append(spearmanr(one.flatten(), another.flatten()).statistic)
    # of the same weights the correlation would be 1
    assert abs(np.mean(correlations)) < 0.5
    assert np.nanmean(found) < inside_share(maps, inside) - 0.2


def test_integrated_gradients_are_those_of_an_independent_sum():
    encoder, direction = small_encoder().double(), torch.randn(8, generator=generator()).double()
    image = torch.randn(1, 3, SIZE, SIZE, generator=generator(1)).double()
    total, steps = torch.zeros_like(image), 400
    for step in range(steps):  # the midpoint rule
        point = ((step + 0.5) / steps * image).requires_grad_()
        cosine_similarity(encoder(point), direction.unsqueeze(0)).sum().backward()
        total += point.grad / steps
    expected = (image * total).sum(dim=1)
    result = attribution(encoder, image, direction, steps=400)
    # both rules converge; the difference is a small part of the largest value
    assert float((result.maps - expected).abs().max()) < 0.02 * float(expected.abs().max())


def test_a_linear_encoder_has_a_closed_form_for_grad_cam():
    """With one convolution of 1 x 1, averaged, the cosine's gradient for each channel is that of its average."""
    encoder = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    images, direction = torch.randn(2, 3, 6, 6, generator=generator()).double(), torch.tensor([1.0, -1, 2, 0]).double()
    maps = encoder[0](images).detach()
    means = maps.mean(dim=(2, 3)).requires_grad_()
    cosine_similarity(means, direction.unsqueeze(0)).sum().backward()
    weights = means.grad / 36  # every position has the gradient of the average, divided by their number
    expected = (weights[:, :, None, None] * maps).sum(dim=1).clamp(min=0)
    np.testing.assert_allclose(attribution(encoder, images, direction, "grad_cam").maps, expected, rtol=1e-6, atol=1e-9)


def test_the_map_is_complete_and_the_encoder_stays_as_it_was(trained):
    encoder, _ = trained
    encoder.train()
    encoder[0].eval()
    before = [value.detach().clone() for parameter in encoder.parameters() for value in (parameter, parameter.grad)]
    images, _, _ = patches(4, seed=5)
    with torch.inference_mode():
        direction = encoder(images[:1])[0]  # as Embedder gives it
    result = attribution(encoder, images, direction, steps=128)
    assert result.cosines[0] == pytest.approx(1, abs=1e-5)
    assert result.delta.abs().max() < 0.02
    torch.testing.assert_close(result.maps.sum(dim=(1, 2)) - result.delta, result.cosines - result.baseline_cosine)
    assert encoder.training
    assert not encoder[0].training
    after = [value for parameter in encoder.parameters() for value in (parameter, parameter.grad)]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    encoder.eval()


@pytest.mark.parametrize(
    ("build", "name", "size"),
    [
        (lambda: ImageEncoder("resnet10", width=0.125, image_size=32), "backbone.layer4", 32),
        (lambda: mobilenet_v3_small(weights=None), "features", 64),
        (lambda: densenet121(weights=None), "features", 64),
        (lambda: convnext_tiny(weights=None), "features", 64),
        (lambda: vit_b_16(weights=None, image_size=32), None, 32),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4)), None, 32),
    ],
    ids=["resnet", "mobilenet", "densenet", "convnext", "vit", "linear"],
)
def test_the_last_feature_map_of_real_backbones(build, name: str | None, size: int):
    encoder = build().eval()
    images = torch.randn(1, 3, size, size, generator=generator())
    layer = last_feature_map(encoder, images)
    assert layer is (None if name is None else encoder.get_submodule(name))
    direction = torch.randn(encoder(images).shape[1], generator=generator())
    if layer is None:
        with pytest.raises(ValueError, match="encoder must be convolutional for method 'grad_cam'"):
            attribution(encoder, images, direction, "grad_cam")
    else:
        maps = attribution(encoder, images, direction, "grad_cam").maps
        assert maps.shape == (1, size, size)
        assert maps.min() >= 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "saliency"}, "method must be 'integrated_gradients' or 'grad_cam', got 'saliency'"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"images": torch.zeros(1, 3, 4, 4, dtype=torch.uint8)}, "images must be normalised floats"),
        ({"direction": torch.zeros(8)}, "direction must be finite and not zero"),
        ({"direction": torch.ones(1, 8)}, r"of shape \(D,\), got torch.float32 of shape \(1, 8\)"),
        ({"direction": torch.ones(3)}, r"direction must have the 8 dimensions of the embeddings, got 3"),
    ],
)
def test_errors_name_the_argument(change, message: str):
    arguments = {"images": torch.zeros(1, 3, SIZE, SIZE), "direction": torch.ones(8), **change}
    with pytest.raises(ValueError, match=message):
        attribution(small_encoder(), **arguments)


# The explanation of an image


def embedder(means: Tensor | None = None) -> Embedder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = ImageEncoder("resnet10", width=0.125, image_size=32, embedding_dim=6)
    preprocessing = Preprocessing(32, mean=(0.5,) * 3, std=(0.25,) * 3)
    names = ["cat", "<b>dog</b>", "owl"]
    return Embedder(encoder, preprocessing, TrainingClasses(names, torch.eye(6)[:3] if means is None else means), "cpu")


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 40, 50, 3), dtype=np.uint8)
    paths = [tmp_path / f"image{index}.png" for index in range(4)]
    for path, each in zip(paths, pixels, strict=True):
        Image.fromarray(each).save(path)
    return paths


def test_an_explanation_agrees_with_the_embedder(files):
    model = embedder()
    result = explain(model, files[0], gallery=files[0].parent, k=3, steps=8)
    (view,) = result.views
    embedding = model(files[0])
    cosines = model.scores(embedding).squeeze(0)
    best = int(cosines.argmax())
    assert view.target == f"the mean of {result.classes.names[best]}"
    assert view.cosine == pytest.approx(float(cosines[best]), abs=1e-5)
    assert result.nearest[0] == (result.classes.names[best], pytest.approx(float(cosines[best])))
    torch.testing.assert_close(view.shares.shares, model.shares(embedding).shares.squeeze(0))
    embeddings = model(files)
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    expected = np.sort(unit @ unit[0])[::-1][:3]
    assert result.neighbors[0].path == str(files[0])
    np.testing.assert_allclose([each.cosine for each in result.neighbors], expected, atol=1e-5)
    index = files[0].parent / "index.npz"
    np.savez(index, embeddings=embeddings, paths=np.array([str(path) for path in files]))
    found = explain(model, files[0], gallery=index, k=3, steps=8).neighbors
    assert [each.path for each in found] == [each.path for each in result.neighbors]
    np.testing.assert_allclose([each.cosine for each in found], expected, atol=1e-5)
    named = explain(model, files[0], class_name="owl", steps=8).views[0]
    assert named.cosine == pytest.approx(float(cosines[2]), abs=1e-5)


def test_against_another_image_both_are_explained(files):
    model = embedder()
    first, second = explain(model, files[0], against=files[1], steps=8).views
    one, other = model(files[:2])
    expected = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
    assert [first.target, second.target] == [f"{path.parent.name}/{path.name}" for path in (files[1], files[0])]
    assert first.cosine == pytest.approx(expected, abs=1e-5)
    assert second.cosine == pytest.approx(expected, abs=1e-5)


def test_errors_of_an_explanation(files):
    model = embedder(means=torch.tensor([[1.0] * 6, [2.0] * 6, [float("nan")] * 6]))
    with pytest.raises(ValueError, match="must be one of the 3 classes of the model, got 'cats'; do you mean cat"):
        explain(model, files[0], class_name="cats")
    with pytest.raises(ValueError, match="class_name must be a class with training images, got 'owl'"):
        explain(model, files[0], class_name="owl")
    with pytest.raises(ValueError, match="only one of against and class_name can be given"):
        explain(model, files[0], against=files[1], class_name="cat")
    with pytest.raises(FileNotFoundError, match="no gallery at 'nowhere'"):
        explain(model, files[0], gallery="nowhere")
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        explain(model, files[0], k=0)
    model.classes = None
    with pytest.raises(ValueError, match="the model must know its class means"):
        explain(model, files[0])
    assert explain(model, files[0], against=files[1], steps=4).views[0].shares is None


class Page(HTMLParser):
    """Tags of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def test_the_page_holds_its_pictures_and_escapes_names(files, tmp_path):
    model = embedder()
    name = tmp_path / "<script>alert(1).png"
    files[0].rename(name)
    result = explain(model, name, class_name="<b>dog</b>", gallery=tmp_path, steps=4)
    path = write_explanation(result, tmp_path / "out")
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "b", "link"} & {tag for tag, _ in page.tags}
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 2 + len(result.neighbors)
    for attributes in images:
        assert attributes["src"].startswith("data:image/")
        assert attributes["alt"]
    assert re.findall(r"https?://", text) == []
    for picture in ("attribution.png", "shares.png"):
        with Image.open(path.parent / picture) as image:
            assert image.size[0] == 800


def test_the_sentence_about_shares_says_what_cannot_be():
    assert "3 classes are 0.00 from orthogonal directions" in about_shares(orthogonal_basis(torch.eye(5)[:3]))
    many = about_shares(orthogonal_basis(torch.randn(8, 4, generator=generator())))
    assert "8 classes span 4 dimensions, so they cannot be orthogonal" in many
    assert "50 % on average" in many
    assert "They span all 4 dimensions: nothing can belong to no class." in many


def test_the_figure_shows_each_image_and_its_maps():
    images = torch.randint(256, (2, 3, 12, 16), dtype=torch.uint8, generator=generator())
    positive = torch.rand(2, 12, 16, generator=generator())
    figure = attribution_figure(images, [positive, -positive], ["one", "two"], ["a $ b", "c"])
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), images[0].permute(1, 2, 0))
    np.testing.assert_array_equal(figure.axes[1].images[1].get_array(), positive[0])  # not smoothed: not signed
    assert figure.axes[1].get_title() == "a $ b"
    with pytest.raises(ValueError, match=r"maps must have shape \(2, 12, 16\) to match images, got \(2, 4, 4\)"):
        attribution_figure(images, [torch.zeros(2, 4, 4)], ["one"], ["a", "b"])
    corner = torch.zeros(9, 9)
    corner[7:, 7:], corner[0, 0] = 3.0, 4.0
    assert "at the bottom right (75 % in that ninth" in describe_attribution([corner], ["map"])
    assert describe_attribution([-corner], ["map"]) == "map: no part of the image raises the cosine."


# The command


def test_the_command_explains_an_image_of_a_run(digits_run, tmp_path):
    image = Path(tmp_path, "seven.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)).save(image)
    checkpoint = str(next((digits_run / "checkpoints").glob("last.ckpt")))
    words = ["explain", checkpoint, str(image), "--gallery", str(tmp_path), "--out", str(tmp_path / "out")]
    done = subprocess.run([SIMO, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "no class" in done.stdout
    assert "Integrated gradients sum to" in done.stdout
    assert str(image) in done.stdout
    assert (tmp_path / "out" / "index.html").is_file()


def test_a_missing_captum_is_one_line(monkeypatch, capfd):
    class Hidden:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name.split(".")[0] == "captum":
                raise ModuleNotFoundError("No module named 'captum'", name="captum")

    for name in [each for each in sys.modules if each.split(".")[0] == "captum"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Hidden, *sys.meta_path])
    with pytest.raises(SystemExit) as ended:
        main(["explain", "missing.ckpt", "missing.png"])
    assert ended.value.code == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("simo explain: error: captum is missing: pip install 'simo_lightning[explain]'")
