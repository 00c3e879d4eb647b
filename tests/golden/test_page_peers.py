"""The HTML report in a real browser: Debian's chromium, driven by keys and clicks as a person would."""

import shutil

import numpy as np
import pytest

from tests.golden.faults import golden_of, jolted
from tests.golden.pages import HOSTILE, deep_page, hostile_page, page_with

pytestmark = pytest.mark.peers

WRONG = "layers.1.attn_heads"
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--window-size=1280,1600"),
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no chromium and chromedriver here: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install 'assay[browser]'")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (*QUIET, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=driver)
    opened = webdriver.Chrome(options=options, service=service)
    yield opened
    opened.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    rows = np.arange(40)[:, None, None]
    faults = {
        WRONG: lambda a: np.where((rows > 20) & (np.arange(a.shape[1]) == 2)[:, None], jolted(a), a),
        "layers.2.mlp_norm": jolted,
    }
    return {
        "wrong": page_with(folder / "wrong.html", faults),
        "clean": page_with(folder / "clean.html", {}),
        "logits": page_with(folder / "logits.html", {}, "logits"),
        "hostile": hostile_page(folder / "hostile.html"),
        "deep": deep_page(folder / "deep.html"),
    }


class Page:
    """An open page."""

    def __init__(self, browser, path):
        self.browser = browser
        browser.get_log("browser")
        browser.get(path.as_uri())

    def js(self, expression):
        return self.browser.execute_script(f"return {expression}")

    def text(self, selector):
        return self.js(f"document.querySelector({selector!r}).innerText")

    def press(self, *keys):
        from selenium.webdriver.common.action_chains import ActionChains
        from selenium.webdriver.common.keys import Keys

        for key in keys:
            ActionChains(self.browser).send_keys(getattr(Keys, key, key)).perform()

    def click(self, selector):
        self.browser.find_element("css selector", selector).click()

    @property
    def shown(self):
        """The tap whose detail is drawn."""
        return self.text("#tapname")

    @property
    def focused(self):
        return self.js("document.activeElement.dataset.tap ?? null")


@pytest.fixture
def page(browser, pages, request):
    opened = Page(browser, pages[request.param])
    yield opened
    # nothing went wrong in the page, and nothing was asked for but itself
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    assert opened.js("performance.getEntriesByType('resource').length") == 0


def shows(name):
    return pytest.mark.parametrize("page", [name], indirect=True)


@shows("wrong")
def test_it_opens_at_the_first_divergence(page):
    assert page.text("h1") == "Diverges"
    assert page.text(".where") == f"first wrong at {WRONG}"
    assert page.js("document.querySelector('.plot .callout').textContent") == WRONG
    assert page.shown == WRONG
    assert page.js("document.querySelector('#detail').checkVisibility()")
    assert page.js("document.querySelectorAll('#points .diverges').length") == 2
    assert page.js("document.querySelector('#marker').getAttribute('visibility')") == "visible"
    worst = page.text("#worst")
    assert "query head 2" in worst
    assert f"{WRONG.replace('attn_heads', 'v')}[:" in worst


@shows("wrong")
def test_the_maps_are_hot_where_the_fault_is(page):
    """Positions by heads: red from position 21 on in head 2 alone. Pixels are read back from the canvas."""
    assert page.js("document.querySelectorAll('#maps canvas').length") == 2
    width, height = page.js(
        "[document.querySelector('#maps canvas').width, document.querySelector('#maps canvas').height]"
    )
    assert (width, height) == (4, 32)
    script = "Array.from(document.querySelector('#maps canvas').getContext('2d').getImageData(0, 0, 4, 32).data)"
    rgb = np.array(page.js(script)).reshape(32, 4, 4)[:, :, :3].astype(int)
    hot = rgb[:, :, 0] > rgb[:, :, 1] + 60
    expected = np.zeros((32, 4), bool)
    expected[next(cell for cell in range(32) if (cell + 1) * 40 // 32 > 21) :, 2] = True
    np.testing.assert_array_equal(hot, expected)
    assert "query head 2" in page.text("#maps output")


@shows("wrong")
def test_keys_move_through_the_taps(page):
    for _ in range(12):  # from the top of the page, as a person without a mouse comes to it
        page.press("TAB")
        if page.focused:
            break
    assert page.focused == WRONG
    steps = [
        ("ARROW_RIGHT", "layers.2.attn_heads"),
        ("ARROW_DOWN", "layers.2.attn_out"),
        ("ARROW_LEFT", "layers.1.attn_out"),
        ("HOME", "layers.0.attn_out"),
        ("ARROW_LEFT", "layers.0.attn_out"),
        ("END", "layers.2.attn_out"),
        ("n", "layers.2.mlp_norm"),
        ("p", WRONG),
        ("ARROW_UP", "layers.1.k_rope"),
    ]
    for key, tap in steps:
        page.press(key)
        assert (page.focused, page.shown) == (tap, tap), key
        assert page.js("document.querySelector('#grid [aria-selected=true]').dataset.tap") == tap
        assert page.js("document.querySelectorAll('#grid [tabindex=\"0\"]').length") == 1
        assert page.js("document.querySelector('#says').textContent").startswith(f"{tap}, ")


@shows("wrong")
def test_the_focus_is_seen(page):
    page.press(*["TAB"] * 4, "ARROW_RIGHT")
    width, style = page.js(
        "(({outlineWidth, outlineStyle}) => [outlineWidth, outlineStyle])(getComputedStyle(document.activeElement))"
    )
    assert (width, style) == ("3px", "solid")


@shows("wrong")
def test_clicks_choose_a_tap(page):
    page.click("#grid [data-tap='layers.0.router_logits']")
    assert page.shown == "layers.0.router_logits"
    page.click(".where [data-open]")
    assert page.shown == WRONG
    page.click("#points [data-open='layers.2.mlp_norm']")
    assert page.shown == "layers.2.mlp_norm"


@shows("wrong")
def test_what_a_screen_reader_is_told(page):
    assert page.js("document.documentElement.lang") == "en"
    label = page.js(f"document.querySelector('#grid [data-tap=\"{WRONG}\"]').getAttribute('aria-label')")
    assert label.startswith(f"{WRONG}, diverges, ")
    assert page.js("document.querySelector('#grid').getAttribute('role')") == "grid"
    for role in ("row", "gridcell", "rowheader", "columnheader"):
        assert page.js(f"document.querySelectorAll('#grid [role={role}]').length") > 2
    unnamed = "(n) => !n.getAttribute('aria-label') && !n.querySelector('title')"
    assert page.js(f"[...document.querySelectorAll('svg, canvas')].filter({unnamed}).length") == 0
    assert page.js("document.querySelector('.plot title').textContent").startswith(WRONG)


def brightness(page):
    return sum(map(int, page.js("getComputedStyle(document.body).backgroundColor.match(/\\d+/g)")))


@shows("wrong")
def test_light_dark_and_print(page):
    def emulate(**media):
        page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)

    try:
        emulate(features=[{"name": "prefers-color-scheme", "value": "light"}])
        assert brightness(page) > 700
        emulate(features=[{"name": "prefers-color-scheme", "value": "dark"}])
        assert brightness(page) < 120
        page.click("#theme")
        assert brightness(page) > 700
        assert page.text("#theme") == "Dark"
        page.click("#theme")
        assert brightness(page) < 120
        emulate(media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}])
        assert brightness(page) == 3 * 255
        assert not page.js("document.querySelector('#theme').checkVisibility()")
    finally:
        emulate(media="", features=[])


@shows("deep")
def test_24_layers_fit_on_a_printed_page(page):
    """At the width of A4 less margins of 1 cm, 718 pixels, nothing is cut off at the right."""
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    page.browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 718, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
    )
    try:
        assert page.js("document.documentElement.scrollWidth") <= 718
        assert page.js("document.querySelector('#grid').getBoundingClientRect().right") <= 718
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


@shows("hostile")
def test_hostile_names_do_nothing(page):
    assert page.js("window.hacked ?? null") is None
    assert "assay" in page.browser.title
    assert page.js("document.querySelectorAll('img').length") == 0
    assert page.js("document.querySelectorAll('script').length") == 2
    assert page.text(".brand b") == HOSTILE
    page.press(*["TAB"] * 4, "ARROW_DOWN", "ARROW_DOWN", "ARROW_UP")
    for index in range(page.js("document.querySelectorAll('#grid [data-tap]').length")):
        page.js(f"document.querySelectorAll('#grid [data-tap]')[{index}].click()")
    assert page.js("window.hacked ?? null") is None
    assert page.js("document.querySelectorAll('img').length") == 0


@shows("clean")
def test_every_tap_can_be_drawn(page):
    names = page.js(
        "[...document.querySelectorAll('#grid [data-tap]')].map((cell) => (cell.click(), cell.dataset.tap))"
    )
    assert set(names) == set(golden_of().taps)
    page.js("document.querySelector('#grid [data-tap=\"layers.0.expert_ids\"]').click()")
    assert not page.js("document.querySelector('#histogram').checkVisibility()")
    assert "the same expert" in page.text("#maps output")


@shows("logits")
def test_a_dump_of_logits_alone(page):
    assert page.text("h1") == "Matches"
    assert page.shown == "logits"
    assert "embed; layers 0 to 2: attn_norm, q, k, v, " in page.text("#tapfigures")
    assert page.js("document.querySelectorAll('#maps canvas').length") == 1
