"""The report in a real browser, at the width of a phone and of a desk."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from simo_lightning.report import write_report
from tests.test_report import Data, Foreign, snapshots, trainer

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Runs in the page once everything is loaded, and tells the page around it what it saw.
PROBE = """<script>
addEventListener("load", () => {
  const light = color => {
    const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = element => {
    for (let e = element; e; e = e.parentElement) {
      const color = getComputedStyle(e).backgroundColor;
      if (!color.endsWith(", 0)")) return color;
    }
    return "rgb(255, 255, 255)";
  };
  const texts = [...document.body.querySelectorAll("*")].filter(
    e => [...e.childNodes].some(n => n.nodeType === Node.TEXT_NODE && n.textContent.trim()));
  const contrast = e => {
    const pair = [light(getComputedStyle(e).color), light(ground(e))].sort((a, b) => b - a);
    return (pair[0] + 0.05) / (pair[1] + 0.05);
  };
  parent.postMessage("SEEN" + JSON.stringify({
    width: innerWidth,
    page: document.documentElement.scrollWidth,
    images: [...document.images].map(i => [i.naturalWidth, i.getBoundingClientRect().width, i.alt.length]),
    lefts: [...new Set([...document.images].filter(i => i.naturalWidth > 200).map(
      i => Math.round(i.getBoundingClientRect().left)))],
    smallest: Math.min(...texts.map(e => parseFloat(getComputedStyle(e).fontSize))),
    outside: texts.filter(e => e.getBoundingClientRect().right > innerWidth + 1).length,
    contrast: Math.min(...texts.map(contrast)),
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
    ground: light(ground(document.body)),
    behind: [...document.images].map(i => light(getComputedStyle(i).backgroundColor)),
  }) + "END", "*");
});
</script></body>"""
# No window is narrower than 500 pixels, but an iframe in it can be.
AROUND = """<!DOCTYPE html><meta name="color-scheme" content="light dark"><title></title>
<script>addEventListener("message", event => { document.title = event.data; });</script>
<iframe src="probed.html" style="border: 0; width: WIDTHpx; height: 900px"></iframe>"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on PATH"),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with everything on it, and a class of a long name without a space."""
    folder = tmp_path_factory.mktemp("browser")
    snapshots(folder / "plots" / "snapshots")
    data = Data()
    data.class_names = ["a_very_long_name_of_a_class_without_any_space_in_it", "cat", "dog"]
    name = "a_config_with_a_name_as_long_as_this_one_without_a_space"
    return write_report(trainer(default_root_dir=folder), Foreign(), data, None, config_name=name)


def see(page: Path, width: int, dark: bool = False) -> dict[str, Any]:
    probed = page.with_name("probed.html")
    probed.write_text(page.read_text(encoding="utf-8").replace("</body>", PROBE), encoding="utf-8")
    around = page.with_name("around.html")
    around.write_text(AROUND.replace("WIDTH", str(width)), encoding="utf-8")
    words = [str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    words += [f"--user-data-dir={page.parent / 'profile'}", f"--blink-settings=preferredColorScheme={int(not dark)}"]
    words += ["--window-size=1400,1000", "--virtual-time-budget=5000", "--dump-dom", around.as_uri()]
    dom = subprocess.run(words, check=True, capture_output=True, text=True, timeout=120).stdout
    found = re.search("<title>SEEN(.*)END</title>", dom, re.DOTALL)
    assert found is not None, dom[:2000]
    seen: dict[str, Any] = json.loads(unescape(found.group(1)))
    assert seen["width"] == width
    assert seen["dark"] == dark
    return seen


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_is_readable(report: Path, width: int, dark: bool) -> None:
    seen = see(report, width, dark)
    figures = [image for image in seen["images"] if image[0] > 200]
    assert (
        len(figures) == 7
    )  # two of shares, spectrum, norms and three of training; the matrix and the maps are drawn in place
    assert len(seen["images"]) > len(figures)
    for natural, _, alt in seen["images"]:
        assert natural > 0, "a picture is missing"
        assert alt > 5
    for _, shown, alt in figures:
        assert shown > 0.8 * min(width, 480)
        assert alt > 20
    assert seen["page"] <= width, "the page scrolls sideways"
    assert seen["outside"] == 0
    assert seen["smallest"] >= 14
    assert seen["contrast"] >= 4.5  # WCAG 2.2, AA
    assert (seen["ground"] < 0.1) == dark
    assert set(seen["behind"]) == {1}  # pictures are drawn for white
    assert len(seen["lefts"]) == (1 if width == 390 else 2), "columns"
