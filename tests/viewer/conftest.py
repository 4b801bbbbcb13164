"""A recording of random attention, its page, and Chromium to open it in."""

import base64
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from i2am.attribution import AttributionMaps
from i2am.testing import make_maps, make_site
from i2am.viewer import Sample, render, sample

GENERATED, REFERENCE, TIMES, HEADS, STEPS = (8, 6), (6, 5), 3, 2, 6
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)


def make_recording(seed: int = 0, *, pairs: object = True, **recording: Any) -> AttributionMaps:
    """Two layers on two grids, both masks and one region."""
    sites = [
        make_site("down_blocks.0", (4, 3), REFERENCE, heads=HEADS),
        make_site("up_blocks.0", GENERATED, REFERENCE, heads=HEADS),
    ]
    mask, reference_mask, region = torch.zeros(3, 16, 12)
    mask[4:14, 2:10] = reference_mask[3:12, 3:9] = region[8:12, 4:8] = 1
    return make_maps(
        sites,
        samples=1,
        steps=STEPS,
        time_groups=TIMES,
        seed=seed,
        mask=mask,
        reference_mask=reference_mask,
        regions={"sleeve": region},
        pairs=pairs,
        provenance={"steps": STEPS, "regions": {"sleeve": "8,4,4,4@16x12"}},
        **recording,
    )


def make_image(seed: int, size: tuple[int, int] = (48, 64)) -> Image.Image:
    """Coarse random colours."""
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def make_mask(size: tuple[int, int] = (48, 64)) -> Image.Image:
    """A white disc on black."""
    image = Image.new("L", size)
    ImageDraw.Draw(image).ellipse((8, 12, 40, 52), fill=255)
    return image


def make_sample(seed: int = 0, id: str = "one", **options: Any) -> Sample:
    """The recording of a seed with pictures."""
    maps = options.pop("maps", None) or make_recording(seed)
    given = {
        "generated": make_image(seed),
        "reference": make_image(seed + 100, (50, 60)),
        "mask": make_mask(),
        "reference_mask": make_mask((50, 60)),
        "scores": {
            "imacs_g": {"value": -0.1234, "reason": None},
            "imacs_g_share": {"value": 0.5, "reason": None},
            "imacs_g_mask_votes": {"value": 0.25, "reason": None},
            "imacs_r": {"value": None, "reason": "its map is the same everywhere"},
        },
        "truths": {"sleeve": (0.25, 0.75)},
        "facts": {"Model": "random"},
        **options,
    }
    return sample(maps, id=id, **given)


# as fixtures, because a conftest cannot be imported


@pytest.fixture(scope="session", name="make_recording")
def _make_recording() -> Callable[..., AttributionMaps]:
    return make_recording


@pytest.fixture(scope="session", name="make_sample")
def _make_sample() -> Callable[..., Sample]:
    return make_sample


@pytest.fixture(scope="session", name="make_image")
def _make_image() -> Callable[..., Image.Image]:
    return make_image


@pytest.fixture(scope="session")
def recording() -> AttributionMaps:
    return make_recording()


def _missing() -> str | None:
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "needs playwright: pip install playwright"
    if _chromium() is None:
        return "needs Chromium: apt-get install chromium"
    return None


def _chromium() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium, one for all tests."""
    reason = _missing()
    if reason and os.environ.get("CI"):
        pytest.fail(f"the viewer's tests must run in CI: {reason}")
    if reason:
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as profile:
        chromium = playwright.chromium.launch(
            executable_path=_chromium(), args=[*FLAGS], env={**os.environ, "HOME": profile}
        )
        yield chromium
        chromium.close()


class View:
    """An open page; notes every request, message and dialog."""

    def __init__(self, browser: Any, address: str, **options: Any) -> None:
        self.script = options.pop("script", None)
        settings = {"viewport": {"width": 1280, "height": 800}, **options}
        self.context = browser.new_context(**settings)
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.requests: list[str] = []
        self.messages: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.messages.append(message.text))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.messages.append("dialog"), dialog.dismiss()))
        if self.script:
            self.page.add_init_script(self.script)
        self.page.goto(address)

    def wait(self) -> "View":
        """Until pair maps are there too."""
        self.page.wait_for_selector("#status[data-ready=true]", state="attached")
        return self

    @property
    def status(self) -> dict[str, Any]:
        """What the page says of its own state."""
        return json.loads(self.page.text_content("[data-testid=status]"))

    def panel(self, side: str, number: int = 0) -> dict[str, Any]:
        """One picture's part of the state."""
        return [panel for panel in self.status["panels"] if panel["side"] == side][number]

    def place(
        self, side: str, cell: tuple[int, int], grid: tuple[int, int], number: int = 0
    ) -> tuple[float, float]:
        """The middle of a cell on the screen."""
        stage = self.page.locator(f".stage[data-side={side}]").nth(number)
        stage.scroll_into_view_if_needed()
        box = stage.bounding_box()
        return (
            box["x"] + (cell[1] + 0.5) / grid[1] * box["width"],
            box["y"] + (cell[0] + 0.5) / grid[0] * box["height"],
        )

    def point(
        self, side: str, cell: tuple[int, int], grid: tuple[int, int] | None = None
    ) -> dict[str, Any]:
        """Moves the pointer to a cell; returns the answer on the other picture."""
        self.page.mouse.move(*self.place(side, cell, grid or _grid(side)))
        return self.panel(_other(side))

    def drag(self, side: str, first: tuple[int, int], last: tuple[int, int]) -> dict[str, Any]:
        """Drags from a cell to another."""
        self.page.mouse.move(*self.place(side, first, _grid(side)))
        self.page.mouse.down()
        self.page.mouse.move(*self.place(side, last, _grid(side)), steps=3)
        self.page.mouse.up()
        return self.panel(_other(side))

    def away(self) -> None:
        """Takes the pointer off the pictures and lets go of what is held."""
        self.page.mouse.move(4, 4)
        self.page.keyboard.press("Escape")

    def slide(self, id: str, value: float) -> None:
        """Puts a slider somewhere."""
        self.page.locator(f"#{id}").fill(str(value))

    def pixels(self, side: str) -> np.ndarray:
        """uint8 ``[height, width, 3]`` of a picture's canvas."""
        stage = self.page.locator(f".stage[data-side={side}] canvas")
        address = stage.evaluate("canvas => canvas.toDataURL('image/png')")
        data = base64.b64decode(address.split(",")[1])
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

    def close(self) -> None:
        """Ends the visit, which must have been a quiet one."""
        self.context.close()
        asked = [url for url in self.requests if not url.startswith(("file:", "data:", "blob:"))]
        assert not asked
        assert not self.messages


def _grid(side: str) -> tuple[int, int]:
    return GENERATED if side == "generated" else REFERENCE


def _other(side: str) -> str:
    return "reference" if side == "generated" else "generated"


@pytest.fixture(scope="session")
def visit(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., View]:
    """Opens HTML, or a file, from disk; the caller closes it."""

    def visited(page: str | Path, *, link: str = "", **options: Any) -> View:
        if isinstance(page, str):
            file = tmp_path_factory.mktemp("page") / "page.html"
            file.write_text(page, encoding="utf-8")
            page = file
        return View(browser, page.absolute().as_uri() + link, **options)

    return visited


@pytest.fixture(scope="session")
def html() -> str:
    """Two samples."""
    return render([make_sample(), make_sample(1, "two")], title="pair")


@pytest.fixture(scope="module")
def shared(visit: Callable[..., View], html: str) -> Iterator[View]:
    """A page that a module's tests share; `view` brings it back to its beginning."""
    opened = visit(html).wait()
    yield opened
    opened.close()


@pytest.fixture
def view(shared: View) -> View:
    shared.away()
    # through another one, because a link to where we are changes nothing
    shared.page.evaluate("history.replaceState(null, '', '#'); location.hash = '#one/-/all'")
    shared.page.wait_for_selector("#status[data-ready=true]", state="attached")
    for id, value in (("threshold", 0.4), ("opacity", 0.85)):
        shared.slide(id, value)
    shared.page.set_checked("#weights", False)
    shared.page.set_checked("#spread", True)
    shared.page.click("#ranges button[value=own]")
    shared.away()
    return shared


# text whose contrast with the nearest background is below the 4.5 of WCAG AA
CONTRAST = """() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const color = rgb(getComputedStyle(e).backgroundColor);
      if (color.length < 4 || color[3] > 0.5) return color;
    }
  };
  return [...document.querySelectorAll('body *')]
    .filter((e) => e.checkVisibility({ visibilityProperty: true }) && !e.disabled)
    .filter((e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()))
    .filter((e) => {
      const [one, two] = [light(rgb(getComputedStyle(e).color)), light(ground(e))];
      return (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05) < 4.5;
    }).map((e) => e.outerHTML.slice(0, 120));
}"""


@pytest.fixture(scope="session")
def faint() -> Callable[[View], list[str]]:
    """Elements of a view whose text can hardly be read."""
    return lambda view: view.page.evaluate(CONTRAST)
