"""The interactive map and matrix of the report in a real browser: pointer, keyboard, and no request."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from simo_lightning.functional.moments import class_moments
from simo_lightning.report import EmbeddedImages, make_contents, metric_rows, write_page

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on PATH"),
    # of playwright's own event loop
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),
]
MODEL = "Bokeh.documents.map((each) => each.get_model_by_name('%s')).find(Boolean)"
_SECONDS = 120_000  # milliseconds that a step may take on a busy machine


def write_report_of(folder: Path, count: int, num_classes: int, side: int, max_points: int) -> Path:
    """The page of classes at right angles, each image of one colour."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % num_classes
    means = torch.randn(num_classes, 32, generator=generator)
    rows = means[labels] + 0.3 * torch.randn(count, 32, generator=generator)
    colors = torch.randint(0, 256, (num_classes, 3, 1, 1), generator=generator)
    noise = torch.randint(-40, 40, (count, 3, side // 8, side // 8), generator=generator)
    images = (colors[labels] + noise).clamp(0, 255).to(torch.uint8)
    images = images.repeat_interleave(8, 2).repeat_interleave(8, 3)
    names = [f"class-with-a-long-name-{index}" for index in range(num_classes)]
    moments = class_moments(rows, labels, num_classes)
    contents = make_contents(
        folder,
        EmbeddedImages(rows, labels, images),
        moments,
        names,
        metric_rows(moments),
        projections=["pca", "tsne"] if count < 1_000 else ["pca"],
        max_points=max_points,
    )
    return write_page(folder, "A report", {"Config": "made up"}, contents)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report_of(tmp_path_factory.mktemp("few"), 120, 6, side=32, max_points=2_000)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report_of(tmp_path_factory.mktemp("many"), 10_000, 1_000, side=64, max_points=10_000)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def opened(browser: Any, path: Path, width: int, **options: Any) -> Any:
    """The page, once the map is drawn. It must raise no error and load nothing but itself."""
    page = browser.new_page(viewport={"width": width, "height": 900}, **options)
    page.set_default_timeout(_SECONDS)
    page.requests, page.errors = [], []
    page.on("request", lambda request: page.requests.append(request.url))
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready=true]")
    return page


def check_quiet(page: Any, path: Path) -> None:
    assert page.errors == []
    assert [url for url in page.requests if not url.startswith(("data:", "blob:"))] == [path.as_uri()]


def data_of(page: Any) -> dict[str, Any]:
    return json.loads(page.locator("#report-data").text_content())


def places(page: Any) -> list[tuple[float, float]]:
    """Where each point of the map is in the window."""
    page.locator("#map").scroll_into_view_if_needed()
    return page.evaluate(
        """() => {
          const document_ = Bokeh.documents.find((each) => each.get_model_by_name("points"));
          const view = Object.values(Bokeh.index.roots ?? Bokeh.index).find((each) => each.model.name === "map plot");
          const box = document.getElementById("map").getBoundingClientRect();
          const {x, y} = document_.get_model_by_name("points").data;
          return Array.from(x, (_, i) => [
            box.left + document.getElementById("map").clientLeft + view.frame.x_scale.compute(x[i]),
            box.top + document.getElementById("map").clientTop + view.frame.y_scale.compute(y[i])]);
        }"""
    )


def alone(points: list[tuple[float, float]]) -> int:
    """The point that is furthest from all others."""
    rows = torch.tensor(points, dtype=torch.float64)
    return int(torch.cdist(rows, rows).fill_diagonal_(torch.inf).min(dim=1).values.argmax())


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_and_everything_has_a_name(few: Path, browser: Any, width: int):
    page = opened(browser, few, width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("[...document.images].filter((i) => !i.alt.trim() || !i.naturalWidth).length") == 0
    assert (
        page.evaluate(
            """[...document.querySelectorAll('input, button')]
            .filter((e) => !(e.labels?.length || e.textContent.trim())).length"""
        )
        == 0
    )
    check_quiet(page, few)
    page.close()


def test_pointing_shows_the_image_and_its_class(few: Path, browser: Any):
    page = opened(browser, few, 1280)
    data = data_of(page)
    points = places(page)
    index = alone(points)
    page.mouse.move(*points[index])
    tip = page.locator("#map .tip")
    tip.wait_for(state="visible")
    labels = page.evaluate(f"Array.from({MODEL % 'points'}.data.label)")
    assert tip.locator("b").text_content() == data["names"][labels[index]]
    assert data["map"]["titles"][index] in tip.text_content()
    seen = tip.locator(".thumb").evaluate(
        "e => [getComputedStyle(e).backgroundImage.slice(0, 27), getComputedStyle(e).backgroundPosition, e.offsetWidth]"
    )
    cell, sprite = data["map"]["cells"][index], data["map"]["sprite"]
    scale = 112 / sprite["width"]
    row, column = divmod(cell, sprite["columns"])
    assert seen[0].startswith('url("data:image/webp;base64')
    left, top = (float(part.removesuffix("px")) for part in seen[1].split())
    assert left == pytest.approx(-column * sprite["width"] * scale, abs=0.5)
    assert top == pytest.approx(-row * sprite["height"] * scale, abs=0.5)
    assert seen[2] == 112
    page.mouse.move(2, 2)
    tip.wait_for(state="hidden")
    check_quiet(page, few)
    page.close()


def test_a_click_hides_a_class_and_the_buttons_all(few: Path, browser: Any):
    page = opened(browser, few, 1280)
    shown = f"{MODEL % 'shown'}.booleans.filter(Boolean).length"
    assert page.evaluate(shown) == 120
    points = places(page)
    index = alone(points)
    label = index % 6  # the points are stratified in the order of the data
    before = page.locator("#map").screenshot()
    page.get_by_label(data_of(page)["names"][label], exact=True).click()
    assert page.evaluate(shown) == 100
    page.wait_for_timeout(500)
    assert page.locator("#map").screenshot() != before
    points = places(page)
    page.mouse.move(*points[index])
    page.wait_for_timeout(300)
    assert page.locator("#map .tip").is_hidden()  # nothing is there any more
    page.get_by_role("button", name="Hide all").click()
    assert page.evaluate(shown) == 0
    page.get_by_role("button", name="Show all").click()
    assert page.evaluate(shown) == 120
    check_quiet(page, few)
    page.close()


def test_the_projection_can_be_chosen(few: Path, browser: Any):
    page = opened(browser, few, 390)
    before = places(page)
    alt = page.locator("#map-alt").text_content()
    page.get_by_label("t-SNE").check()
    page.wait_for_timeout(500)
    after = places(page)
    box = page.locator("#map").bounding_box()
    assert all(box["x"] <= x <= box["x"] + box["width"] for x, _ in after)  # the axes follow
    assert sum(abs(a[0] - b[0]) > 3 for a, b in zip(before, after, strict=True)) > 60
    assert page.locator("#map-alt").text_content() != alt
    assert "clusters" in page.locator("#map-text").text_content()
    page.close()


def test_the_keyboard_reaches_and_moves_everything(few: Path, browser: Any):
    page = opened(browser, few, 1280)
    reached = set()
    for _ in range(120):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate(
                """(() => {
                  const e = document.activeElement;
                  return e.id || e.name || e.value || e.textContent.trim();
                })()"""
            )
        )
    assert {"map", "matrix", "projection", "0", "5", "Show all", "Hide all"} <= reached
    page.locator("#map").focus()
    page.keyboard.press("ArrowRight")
    tip = page.locator("#map .tip")
    first = tip.text_content()
    assert data_of(page)["map"]["titles"][0] in first
    page.keyboard.press("ArrowRight")
    assert tip.text_content() != first
    page.keyboard.press("Escape")
    assert tip.is_hidden()
    page.locator("#matrix").focus()
    page.keyboard.press("ArrowRight")
    text = page.locator("#matrix .tip").text_content()
    names = data_of(page)["names"]
    assert text.startswith(f"{names[0]}{names[1]}cosine ")
    page.close()


def test_a_finger_scrolls_and_taps(few: Path, browser: Any):
    page = opened(browser, few, 390, has_touch=True, is_mobile=True)
    points = places(page)
    index = alone(points)
    page.touchscreen.tap(*points[index])
    page.locator("#map .tip").wait_for(state="visible")
    assert page.locator("#map .tip b").text_content() == data_of(page)["names"][index % 6]
    check_quiet(page, few)
    page.close()


def test_a_thousand_classes_and_ten_thousand_images(many: Path, browser: Any):
    assert many.stat().st_size < 10e6
    page = opened(browser, many, 1280)
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    data = data_of(page)
    assert len(data["map"]["titles"]) == 10_000
    assert len(data["matrix"]["order"]) == 1_000
    page.get_by_label("Search").fill("NAME-99")
    boxes = page.locator("#marks li:visible")
    assert boxes.count() == 11  # 99 and 990 to 999
    page.get_by_label("class-with-a-long-name-994", exact=True).check()
    marked = f"{MODEL % 'marked'}.booleans.filter(Boolean).length"
    assert page.evaluate(marked) == 10
    page.get_by_role("button", name="Highlight none").click()
    assert page.evaluate(marked) == 0
    page.locator("#matrix").scroll_into_view_if_needed()
    box = page.locator("#matrix").bounding_box()
    page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 0.4 * box["height"])
    page.locator("#matrix .tip").wait_for(state="visible")
    names = [text for text in page.locator("#matrix .tip b").all_text_contents()]
    assert len(names) == 2
    assert all(name.startswith("class-with-a-long-name-") for name in names)
    check_quiet(page, many)
    page.close()
