"""The page in a real browser: `make test-web`. Skipped where gradio, selenium or Chromium is missing."""

import re
import runpy
import shutil
import socket
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from dream_hf.demo import make_rows
from dream_hf.demo.pictures import bundled_picture
from dream_hf.load_models import DEMO, load_models
from dream_hf.page import app
from dream_hf.page.answering import NO_QUESTION, THREAD
from dream_hf.page.app import DEMO_NOTE, launch, make_page
from dream_hf.page.html import TIMES

pytest.importorskip("gradio", reason="needs gradio, extra `web`")
pytest.importorskip("selenium", reason="needs selenium, extra `browser`")
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs chromium and its driver (Debian: chromium-driver)"
)
SPACE = Path(__file__).parents[2] / "examples/space"
LIMIT = 120  # seconds for what takes a few


@pytest.fixture(scope="module")
def models():
    return load_models(DEMO, DEMO, dtype="float32", device="cpu")


@contextmanager
def serving(page):
    """The address of a page that is served while in the block."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launch(page, "localhost", port, prevent_thread_lock=True, quiet=True)
    yield f"http://localhost:{port}/"
    page.close()


@pytest.fixture(scope="module")
def address(models):
    with serving(make_page(models, question="Describe the picture.", max_new_tokens=64, is_demo=True)) as address:
        yield address


@pytest.fixture
def browser(address):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--window-size=1280,900",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def wait(browser, selector):
    """The element, when it is there."""
    return WebDriverWait(browser, LIMIT).until(lambda page: page.find_elements(By.CSS_SELECTOR, selector))[0]


def ask(browser, file, question=None):
    """Upload a picture in place of the one that is there, and press the button."""
    wait(browser, "#answer")
    if browser.find_elements(
        By.CSS_SELECTOR, "#picture button[aria-label='Clear'], #picture button[aria-label='Remove Image']"
    ):
        browser.find_element(
            By.CSS_SELECTOR, "#picture button[aria-label='Clear'], #picture button[aria-label='Remove Image']"
        ).click()
    WebDriverWait(browser, LIMIT).until(lambda page: page.find_elements(By.CSS_SELECTOR, "#picture input[type=file]"))
    browser.find_element(By.CSS_SELECTOR, "#picture input[type=file]").send_keys(str(file))
    wait(browser, "#picture img")
    if question is not None:
        field = browser.find_element(By.CSS_SELECTOR, "#question textarea")
        field.clear()
        field.send_keys(question)
    browser.find_element(By.CSS_SELECTOR, "#answer").click()


def text_of(browser, selector):
    """As it stands in the page, and not as it is laid out."""
    return browser.find_element(By.CSS_SELECTOR, selector).get_property("textContent")


def errors_of(browser):
    return [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_picture_is_uploaded_and_answered_in_both_ways(models, address, browser, tmp_path, theme):
    browser.get(f"{address}?__theme={theme}")
    row = make_rows("chart", 1, 1_000_003)[0]
    row["images"][0].save(tmp_path / "chart.png")
    question = row["messages"][0]["content"][1]["text"]
    ask(browser, tmp_path / "chart.png", question)
    wait(browser, ".dream-figures")
    plain, speculative = (text_of(browser, f"#dream-{name} pre") for name in ("plain", "speculative"))
    assert plain == speculative == answer_of(models, question, row["images"][0])
    assert len(browser.find_elements(By.CSS_SELECTOR, "#dream-speculative pre span")) > 1
    figures = text_of(browser, ".dream-page")
    assert "identical answers" in figures and re.search(rf"\d\.\d\d{TIMES}as fast", figures) and "(tau)" in figures
    assert len(re.findall(r"\d+\.\d\d s, \d+ tokens/s", figures)) == 2
    assert browser.find_elements(By.CSS_SELECTOR, "svg.dream-tree .node.kept rect")
    assert is_dark(browser, "#dream-plain") == (theme == "dark")
    assert is_dark(browser, "#dream-speculative pre span") == (theme == "dark")
    assert not errors_of(browser)


def test_it_fits_a_phone(address, browser):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    )
    browser.get(address)
    wait(browser, "#answer")
    assert re.sub(r"\W", "", DEMO_NOTE) in re.sub(r"\W", "", text_of(browser, "body"))
    wait(browser, "#examples tbody tr, #examples button").click()
    wait(browser, "#picture img")
    browser.find_element(By.CSS_SELECTOR, "#answer").click()
    wait(browser, ".dream-figures")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    left, right = (browser.find_element(By.CSS_SELECTOR, f"#dream-{name}").rect for name in ("plain", "speculative"))
    assert right["y"] >= left["y"] + left["height"] and left["width"] > 280  # one below the other
    assert not errors_of(browser)


def test_what_is_wrong_is_said_in_the_page(address, browser, tmp_path):
    browser.get(address)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and nothing more")
    ask(browser, tmp_path / "broken.png")
    assert wait(browser, "[role=alert].dream-error").text.startswith("The picture cannot be read: ")
    assert not browser.find_elements(By.CSS_SELECTOR, ".dream-answers")
    Image.new("RGB", (8, 8)).save(tmp_path / "whole.png")
    ask(browser, tmp_path / "whole.png", " ")
    WebDriverWait(browser, LIMIT).until(lambda page: text_of(page, ".dream-error") == NO_QUESTION)
    assert not errors_of(browser)


def test_an_answer_ends_when_its_page_is_closed(models, browser):
    page = make_page(models, picture=str(bundled_picture("scene")[0]), question="Describe.", repeats=10_000)
    with serving(page) as address:
        browser.get(address)
        wait(browser, "#answer").click()
        wait(browser, "#dream-plain")
        assert THREAD in {thread.name for thread in threading.enumerate()}
        browser.get("about:blank")
        WebDriverWait(browser, LIMIT).until(lambda _: THREAD not in {thread.name for thread in threading.enumerate()})


def test_the_space_is_this_page(models, monkeypatch):
    served = []
    monkeypatch.setattr(app, "launch", served.append)
    runpy.run_path(str(SPACE / "app.py"), run_name="__main__")
    (page,) = served
    assert "drawn scenes, charts and pages" in str(page.get_config_file())


def answer_of(models, question, image):
    from dream_hf.benchmark.comparison import encode

    inputs = encode(models.processor, question, image)
    output = models.target.generate(**inputs, max_new_tokens=64, do_sample=False)
    return models.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def is_dark(browser, selector):
    """Whether an element's own background is."""
    color = browser.find_element(By.CSS_SELECTOR, selector).value_of_css_property("background-color")
    return sum(map(float, re.findall(r"[\d.]+", color)[:3])) < 3 * 128
