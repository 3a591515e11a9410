"""The page in a real browser: it fits a phone, asks for nothing, and its controls sort and search."""

import json
import shutil
import threading

import pytest
from test_report import evaluation, make_run, metrics, page_of

from konic.report.watch import LivePage, Server

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="the browser test needs playwright: pip install playwright"
)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="the browser test needs Chromium")

RESPONSES = ["the cat sleeps", "a dog barks", "one more <b>cat</b>", "nothing"]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    run = make_run(folder / "run", [0.1 * at for at in range(1, 9)])
    (run / "checkpoint-8").mkdir()
    evaluation(run, 0, [0.0, 1.0, 0.0, 0.5], ["before"] * 4)
    evaluation(run, 8, [1.0, 1.5, 3.0, 0.0], RESPONSES)
    page_of(run, output=run / "report.html")
    return (run / "report.html").as_uri()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_fits_and_asks_for_nothing(browser, address, theme, width):
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=theme)
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert said == [] and asked == [address]
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 3 * 128) == (theme == "dark")
    page.close()


def test_it_prints_in_the_light_theme_from_a_dark_system_too(browser, address):
    page = browser.new_page(color_scheme="dark")
    page.goto(address)
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(251, 251, 250)"
    assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "light"
    page.close()


def test_samples_are_searched_and_sorted(browser, address):
    page = browser.new_page()
    page.goto(address)

    def shown():
        return page.eval_on_selector_all(
            "#list article:not([hidden])", "all => all.map(one => one.querySelectorAll('.response')[1].textContent)"
        )

    assert shown() == RESPONSES
    page.fill("#search", "CAT")
    assert shown() == [RESPONSES[0], RESPONSES[2]]
    assert page.inner_text("#count") == "2 of 4 prompts"
    page.fill("#search", "")
    page.select_option("#sort", "gain")
    assert shown() == [RESPONSES[index] for index in (2, 0, 1, 3)]
    page.select_option("#sort", "-gain")
    assert shown() == [RESPONSES[index] for index in (3, 1, 0, 2)]
    page.select_option("#sort", "")
    assert shown() == RESPONSES
    page.close()


def test_the_keyboard_reaches_the_controls_and_the_checkpoints(browser, address):
    page = browser.new_page()
    page.goto(address)
    reached = set()
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.getAttribute('href')"))
    assert {"#main", "#curves", "checkpoint-8/", "search", "sort"} <= reached
    page.close()


def test_a_served_page_follows_its_run_and_keeps_what_the_reader_did(browser, tmp_path):
    run = make_run(tmp_path / "run", [0.1, 0.2])
    evaluation(run, 0, [0.0, 1.0, 0.0, 0.5], ["before"] * 4)
    evaluation(run, 2, [1.0, 1.5, 3.0, 0.0], RESPONSES)
    page, said = browser.new_page(viewport={"width": 390, "height": 600}), []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.route("**/favicon.ico", lambda route: route.fulfill(status=204))
    with Server(LivePage([run]), 0) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        page.goto(server.url)
        page.evaluate("""window.told = 0; new MutationObserver(() => window.told++).observe(
            document.getElementById("live"), { childList: true, subtree: true, characterData: true })""")
        page.select_option("#sort", "gain")
        page.fill("#search", "cat")
        page.click("#all summary")
        page.focus("#search")
        place = page.evaluate("window.scrollTo(0, 1500), window.scrollY")
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(metrics(3, 0.3)) + "\n")
        page.wait_for_selector("header:has-text('3 iterations')", timeout=20_000)
        assert page.evaluate("[window.scrollY, document.activeElement.id, document.getElementById('all').open]") == [
            place, "search", True,
        ]  # fmt: skip
        assert page.input_value("#sort") == "gain" and page.inner_text("#count") == "2 of 4 prompts"
        page.fill("#search", "")
        assert page.inner_text("#count") == "4 prompts"
        assert said == []
        assert page.evaluate("window.told") == 0  # a screen reader would read it aloud at each look
        server.shutdown()
    page.wait_for_selector("#live:has-text('no longer answers')", timeout=20_000)
    page.close()
