"""The page in a browser: no errors, zoom, hover, printing, narrow screens, light and dark."""

import base64
import re
import shutil

import pytest

from tests.report.records import ABOUT, eval_record, gate_record, train_record, write_run
from xlstm_jax import report

pytest.importorskip("selenium", reason="selenium is not installed")
pytest.importorskip("plotly", reason="plotly is not installed")

from selenium.webdriver import ActionChains, Chrome, ChromeOptions  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402

PROGRAMS = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
MISSING = [name for name, path in PROGRAMS.items() if path is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"{' and '.join(MISSING)} not on the PATH"),
]

SECONDS = 30  # that anything may take
A4_HEIGHT = (297 - 2 * 12) / 25.4 * 96  # pixels between the margins


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Headless Chromium, started by the installed driver: selenium downloads nothing."""
    options = ChromeOptions()
    options.binary_location = PROGRAMS["chromium"]
    profile = tmp_path_factory.mktemp("profile")
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={profile}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options=options, service=Service(PROGRAMS["chromedriver"]))
    driver.set_page_load_timeout(SECONDS)
    driver.set_script_timeout(SECONDS)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def report_path(tmp_path_factory):
    """A report of nine runs, whose colors repeat; one with a hostile name, one just started."""
    folder = tmp_path_factory.mktemp("runs")
    other = ABOUT | {"versions": {"jax": "0.12.0"}}
    names = ["first", "<script>alert(1)<b>%{y}", *"cdefgh"]
    runs = []
    for n, name in enumerate(names):
        losses = [1 + n / 10 + 100 / (step + 50) for step in range(10, 1001, 10)]
        records = [train_record(10 * i, loss=x, mfu=0.4) for i, x in enumerate(losses, 1)]
        records += [eval_record(step, 2 - step / 1000) for step in (500, 1000)]
        records += [gate_record(step, ["0:m", "1:s<i>"]) for step in (500, 1000)]
        about = other if n == 1 else ABOUT
        runs.append(write_run(folder / name, records, about, steps=1000 + n % 2, lr=1e-3 * (n + 1)))
    runs.append(write_run(folder / "started", [train_record(10, skipped=1)]))
    report.write(runs, folder / "report.html")
    return folder / "report.html"


@pytest.fixture
def page(browser, report_path):
    """Opens the report in a window of a size, with light or dark colors."""

    def open_page(width=1280, scheme="light", media=""):
        size = dict(width=width, height=900, deviceScaleFactor=1, mobile=False)
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [dict(name="prefers-color-scheme", value=scheme)]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dict(media=media, features=features))
        browser.get(report_path.as_uri())
        until(browser, "return document.querySelectorAll('.plot .main-svg').length > 9")
        return browser

    return open_page


def until(browser, script: str):
    """Waits until a script returns something true, and returns it."""
    return WebDriverWait(browser, SECONDS, 0.05).until(lambda b: b.execute_script(script))


def axis(browser, chart: str, name: str = "xaxis"):
    plot = f"document.querySelector('#chart-{chart} .plot')"
    return browser.execute_script(
        f"const a = {plot}._fullLayout.{name}; return {{range: a.range, type: a.type,"
        "title: a.title.text}"
    )


def plot_area(browser, chart: str):
    area = browser.find_element("css selector", f"#chart-{chart} .nsewdrag")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", area)
    return area


def test_page_loads_without_messages_and_fetches_nothing(page):
    browser = page()
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert browser.execute_script("return document.documentElement.lang") == "en"


def test_no_button_sends_the_data_elsewhere(page):
    titles = "return [...document.querySelectorAll('.modebar-btn')].map((b) => b.dataset.title)"
    buttons = page().execute_script(titles)
    assert len(buttons) > 9 and not [x for x in buttons if re.search("cloud|link|share", x, re.I)]


def test_drag_zooms_and_double_click_resets(page):
    browser = page()
    before, area = axis(browser, "loss")["range"], plot_area(browser, "loss")
    drag = ActionChains(browser).move_to_element_with_offset(area, -200, -40).click_and_hold()
    drag.move_by_offset(100, 40).move_by_offset(100, 40).release().perform()
    plot = "document.querySelector('#chart-loss .plot')"
    until(browser, f"return {plot}._fullLayout.xaxis.range[0] > {before[0]} + 100")
    low, high = axis(browser, "loss")["range"]
    assert before[0] < low < high < before[1]
    ActionChains(browser).double_click(area).perform()
    until(browser, f"return {plot}._fullLayout.xaxis.range[0] < {before[0]} + 100")


def test_hover_shows_run_step_and_four_digits(page):
    browser = page()
    area = plot_area(browser, "loss")
    # The offset of a point from the center of the chart.
    x, y = browser.execute_script("""
        const plot = document.querySelector("#chart-loss .plot"), trace = plot.data[0];
        const {xaxis: x, yaxis: y} = plot._fullLayout;
        return [x.d2p(trace.x[50]) - x._length / 2, y.d2p(trace.y[50]) - y._length / 2];
    """)
    ActionChains(browser).move_to_element_with_offset(area, round(x), round(y)).perform()
    text = until(browser, "return document.querySelector('.hoverlayer .hovertext')?.textContent")
    assert text == f"firststep 510{1 + 100 / 560:.4g}"


def test_name_of_a_run_is_shown_as_text(page):
    browser = page()
    assert "<script>alert(1)<b>%{y}" in browser.find_element("id", "summary").text
    hover = "Plotly.Fx.hover(document.querySelector('#chart-loss .plot'), [{curveNumber: 1, "
    browser.execute_script(hover + "pointNumber: 50}])")
    text = until(browser, "return document.querySelector('.hoverlayer .hovertext')?.textContent")
    assert text.startswith("<script>alert(1)<b>%{y}step 510")


def test_switches_change_the_axes_of_all_charts(page):
    browser = page()
    assert axis(browser, "loss")["title"] == "step"
    for value, title in (("tokens_seen", "tokens"), ("seconds", "time in train steps, minutes")):
        browser.find_element("css selector", f"[value={value}]").click()
        assert [axis(browser, chart)["title"] for chart in ("loss", "lr", "gates")] == [title] * 3
    browser.find_element("name", "log").click()
    assert axis(browser, "loss", "yaxis")["type"] == axis(browser, "grad", "yaxis")["type"] == "log"
    assert axis(browser, "tokens", "yaxis")["type"] == "linear"


def test_runs_can_be_hidden(page):
    browser = page()
    count = "return document.querySelector('#chart-loss .plot').data.length"
    browser.find_element("css selector", "[data-run='1']").click()
    assert browser.execute_script(count) == 8
    browser.find_element("id", "none").click()
    assert browser.execute_script(count) == 0
    browser.find_element("id", "all").click()
    assert browser.execute_script(count) == 9


def test_choices_change_a_chart(page):
    browser = page()
    browser.find_element("css selector", "#chart-validation option[value=code_loss]").click()
    assert axis(browser, "validation", "yaxis")["title"] == "code loss"
    browser.find_element("css selector", "#gate-controls option[value=forget_mean]").click()
    data = browser.execute_script("return document.querySelector('#chart-gates-last .plot').data")
    assert data[0]["z"] == [[0.9, 0.99]] * 2 and data[0]["y"] == ["0:m", "1:s&lt;i&gt;"]


@pytest.mark.parametrize("width", [320, 390, 768])
def test_narrow_screens_need_no_horizontal_scrolling(page, width):
    browser = page(width)
    script = "return [document.documentElement.scrollWidth, innerWidth]"
    scroll_width, inner_width = browser.execute_script(script)
    assert scroll_width <= inner_width == width
    ends = "return [...document.querySelectorAll('.main-svg')].map((s) => s.getBoundingClientRect()"
    assert all(0 < end <= width for end in browser.execute_script(ends + ".right)"))


# Pairs of text and background colors that are below a contrast of 4.5, and of line colors below 3.
CONTRAST = """
const parse = (c) => (c.match(/[\\d.]+/g) || []).map(Number);
const luminance = (c) => parse(c).slice(0, 3).map((v) => v / 255)
  .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const contrast = (a, b) => {
  const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
  return (high + 0.05) / (low + 0.05);
};
const background = (e) => {
  const color = getComputedStyle(e).backgroundColor;
  return (parse(color)[3] ?? 1) > 0 && parse(color).length ? color : background(e.parentElement);
};
const bad = [];
let count = 0;
for (const e of document.querySelectorAll("body *:not(script):not(option)")) {
  const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
  if (!own || !e.getClientRects().length || e.closest(".heatmaplayer, .notifier-note")) continue;
  const style = getComputedStyle(e);
  const color = e instanceof SVGElement ? style.fill : style.color;
  count += 1;
  if (contrast(color, background(e)) < 4.5) bad.push([e.textContent, color, background(e)]);
}
for (const e of document.querySelectorAll("#controls .swatch path, #chart-loss .js-line")) {
  count += 1;
  if (contrast(getComputedStyle(e).stroke, background(e)) < 3) bad.push([e.outerHTML]);
}
return [getComputedStyle(document.body).backgroundColor, count, bad];
"""


def test_light_and_dark_have_contrast_and_differ(page):
    colors = {}
    for scheme in ("light", "dark"):
        colors[scheme], count, bad = page(scheme=scheme).execute_script(CONTRAST)
        assert count > 200 and bad == []
    assert colors["light"] != colors["dark"]


def test_charts_follow_a_change_of_the_color_scheme(page):
    browser = page()
    color = "return getComputedStyle(document.querySelector('#chart-loss .js-line')).stroke"
    light = browser.execute_script(color)
    features = [dict(name="prefers-color-scheme", value="dark")]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dict(features=features))
    until(browser, f"{color} !== '{light}'")
    assert browser.execute_script(color) != light


def test_printed_charts_fit_a_page_and_have_legends(page):
    browser = page(1280, "dark")
    features = [dict(name="prefers-color-scheme", value="dark")]
    emulated = dict(media="print", features=features)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", emulated)
    until(browser, "return document.documentElement.classList.contains('printing')")
    background, _, bad = browser.execute_script(CONTRAST)
    assert background == "rgb(255, 255, 255)" and bad == []
    figures = browser.execute_script("""
        return [...document.querySelectorAll("figure")].map((f) => ({
          breaks: getComputedStyle(f).breakInside, height: f.offsetHeight, id: f.id,
          width: f.querySelector(".main-svg").getBoundingClientRect().width,
          overflow: f.querySelector(".main-svg").getBoundingClientRect().height
            - f.querySelector(".plot").offsetHeight,
          names: [...f.querySelectorAll(".key .run")].filter((x) => x.offsetWidth).length,
        }))
    """)
    assert len(figures) == 10
    for figure in figures:
        assert figure["breaks"] == "avoid" and figure["height"] < A4_HEIGHT
        assert figure["width"] <= 680 and figure["overflow"] <= 0
        assert figure["names"] == (0 if figure["id"].startswith("chart-gates") else 9)


def test_printing_to_pdf_gives_pages_with_the_sections(page):
    browser = page()
    options = dict(preferCSSPageSize=True, printBackground=True)
    options |= dict(generateTaggedPDF=True, generateDocumentOutline=True)
    pdf = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", options)["data"])
    assert len(re.findall(rb"/Type /Page\b", pdf)) in range(5, 15)
    # The outline lists the headings; text within pages is compressed.
    for heading in ("9 training runs", "Losses", "Training loss", "Gate statistics", "Environment"):
        assert f"/Title ({heading})".encode() in pdf
    until(browser, "return !document.documentElement.classList.contains('printing')")
