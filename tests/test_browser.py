"""TensorBoard and report.html in a real browser, where there is one: `pip install -e ".[browser]"` and a Chromium.

LOOK=folder keeps the images of every page, to be looked at.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import small_config, trained

playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: the extra 'browser' has it"
)
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
if not CHROMIUM:
    pytest.skip("no Chromium is installed", allow_module_level=True)


@pytest.fixture(scope="module")
def shown(ears, tmp_path_factory) -> Path:
    """A run with identities, a projector and a report."""
    config = small_config(
        ["", str(ears / "train_teacher.npy"), "", str(ears / "eval.csv")],
        output_dir=str(tmp_path_factory.mktemp("shown")),
        max_epochs=3,
        projector=True,
        report=True,
    )
    return trained(config)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        words = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
        words += [
            "--use-angle=swiftshader",
            "--enable-unsafe-swiftshader",
            "--ignore-gpu-blocklist",
        ]  # the projector wants WebGL
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=words)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def tensorboard(shown):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--logdir", str(shown), "--port", str(port), "--samples_per_plugin", "images=1000"]
    server = subprocess.Popen([sys.executable, "-m", "tensorboard.main", *options], stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    for _ in range(120):
        try:
            urllib.request.urlopen(f"{address}/data/runs", timeout=2).close()
            break
        except OSError:
            time.sleep(0.5)
    yield address
    server.terminate()
    server.wait()


def keep(page, name: str, **options) -> None:
    if folder := os.environ.get("LOOK"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=str(Path(folder) / f"{name}.png"), **options)


@pytest.mark.parametrize(
    "tab, words",
    [
        ("timeseries", ["classes/entropy", "classes/pictures"]),
        ("custom_scalars", ["Is it collapsing?", "spread", "effective rank"]),
        ("hparams", ["Hyperparameters", "augmentation", "val/retrieval"]),
        ("histograms", ["classes/pictures"]),
        ("projector", ["Points", "12", "Label by"]),
    ],
)
def test_the_panels_of_tensorboard_are_there(tab, words, tensorboard, browser):
    page = browser.new_page(viewport={"width": 1600, "height": 1000})
    page.goto(f"{tensorboard}/#{tab}")
    missing = list(words)
    for _ in range(120):  # some panels live in frames of their own
        missing = [text for text in missing if not any(frame.get_by_text(text).count() for frame in page.frames)]
        if not missing:
            break
        page.wait_for_timeout(500)
    keep(page, tab)
    assert missing == []
    page.wait_for_timeout(1500)
    keep(page, tab)
    page.close()


def test_the_collages_are_drawn_in_tensorboard(tensorboard, browser):
    page = browser.new_page(viewport={"width": 1600, "height": 1000})
    page.goto(f"{tensorboard}/#images")
    drawn = page.locator("tf-image-loader img").first
    drawn.wait_for(state="visible", timeout=60_000)
    page.wait_for_timeout(1500)
    assert drawn.evaluate("image => image.naturalWidth") > 400
    keep(page, "images")
    page.close()


@pytest.mark.parametrize("width", [1600, 1024, 390])
def test_the_report_fits_the_window_and_asks_no_machine(width, shown, browser):
    page = browser.new_page(viewport={"width": width, "height": 900})
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto((shown / "report.html").absolute().as_uri())
    page.wait_for_timeout(500)
    assert [url for url in asked if not url.startswith(("data:", "file:"))] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    keep(page, f"report_{width}", full_page=True)
    page.close()
