"""The report driven in headless Chromium: it opens, sorts, filters, fits a phone, and can be read in the dark."""

import re
import shutil
import subprocess

import pytest
import suite_records

from pysparse.suite.report import page, rows_of
from pysparse.suite.report.rows import front

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None,
    reason=f"Chromium is missing: chromium {CHROMIUM}, chromedriver {DRIVER} "
    "(Debian: apt-get install chromium chromium-driver)",
)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip
PHONE, DESK = (390, 844), (1280, 900)
READABLE = 4.5  # WCAG 2.2, contrast of text at level AA
HOSTILE = "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"


@pytest.fixture(scope="module")
def records():
    made = suite_records.records()
    made += [suite_records.record("language", HOSTILE, "wanda", seed=seed) for seed in (0, 1)]
    bad = suite_records.record("language", "demo", "sparsegpt", "unstructured", 0.9)
    return [*made, suite_records.failed(bad, message=HOSTILE)]


@pytest.fixture(scope="module")
def address(records, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page(records, f"A grid {HOSTILE}"), encoding="utf-8")
    assert path.stat().st_size < 2_000_000
    return path.as_uri()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    webdriver = pytest.importorskip(
        "selenium.webdriver", reason="selenium is missing: pip install 'pysparse[dev]'"
    )
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = Service(DRIVER, log_output=subprocess.DEVNULL)
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


@pytest.fixture
def opened(chromium, address):
    """Open the page at a size and in a colour scheme; at the end nothing may have been complained of."""

    def open_page(size=DESK, scheme="light", fragment=""):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
            "width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE,
        })  # fmt: skip
        chromium.get("about:blank")  # so that a fragment alone loads the page anew
        chromium.get(address + fragment)
        return chromium

    yield open_page
    assert chromium.get_log("browser") == []


def texts(driver, selector):
    return driver.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map((node) => node.textContent)", selector
    )


def count(driver, selector):
    return driver.execute_script("return document.querySelectorAll(arguments[0]).length", selector)


def click(driver, selector):
    driver.execute_script("document.querySelector(arguments[0]).click()", selector)


def choose(driver, key, value):
    click(driver, f'.facet[data-key="{key}"] input[value="{value}"]')


def press(driver, *keys):
    from selenium.webdriver import ActionChains

    ActionChains(driver).send_keys(*keys).perform()


def test_the_page_shows_the_run(opened, records):
    driver = opened()
    rows = rows_of(records)
    assert count(driver, "table.results tbody tr") == len(rows)
    assert count(driver, "#pareto .panel") == len({(row.task, row.model) for row in rows})
    assert count(driver, "#pareto .point[data-row]") == len(rows)
    assert count(driver, "table.failures tbody tr") == sum(one["status"] == "failed" for one in records)
    assert count(driver, "#layers .curve") > 0


def test_hostile_names_are_text(opened):
    driver = opened()
    assert "taken" not in driver.title.split("pysparse suite")[-1]
    assert driver.title.startswith("A grid </script>")
    assert count(driver, "img") == 0
    assert HOSTILE in texts(driver, "table.results tbody td")
    assert any(HOSTILE in text for text in texts(driver, "table.failures .message"))


@pytest.mark.parametrize(
    ("key", "down"),
    [
        ("kept", True),
        pytest.param("speed", True, marks=pytest.mark.slow),
        pytest.param("prune", False, marks=pytest.mark.slow),
        pytest.param("memory", False, marks=pytest.mark.slow),
    ],
)
def test_sorting_by_figures(opened, records, key, down):
    driver = opened()
    column = texts(driver, "table.results thead th").index(
        {"kept": "Quality kept", "speed": "Speed-up", "prune": "Pruning", "memory": "Peak memory"}[key]
    )
    heading = f'table.results th[data-key="{key}"]'
    for turn in range(2):
        click(driver, f"{heading} button")
        cells = texts(driver, f"table.results tbody tr > :nth-child({column + 1})")
        figures = [float(re.match(r"[\d.]+", cell).group()) for cell in cells]
        falling = down == (turn == 0)
        assert figures == sorted(figures, reverse=falling)
        assert len(set(figures)) > 5
        shown = driver.execute_script("return document.querySelector(arguments[0]).ariaSort", heading)
        assert shown == ("descending" if falling else "ascending")


@pytest.mark.slow
def test_sorting_by_name_from_the_keyboard(opened, records):
    driver = opened()
    driver.execute_script("document.querySelector('table.results th[data-key=model] button').focus()")
    press(driver, "\ue007")
    models = texts(driver, "table.results tbody tr > :nth-child(2)")
    assert sorted(models, key=str.lower) == models
    assert len(models) == len(rows_of(records))


def test_filters_hide_rows_points_and_failures(opened, records):
    driver = opened()
    rows = rows_of(records)
    choose(driver, "model", "cnn-a")
    choose(driver, "method", "wanda")
    mine = [row for row in rows if (row.model, row.method) == ("cnn-a", "wanda")]
    assert 0 < len(mine) < len(rows)
    assert count(driver, "table.results tbody tr") == count(driver, "#pareto .point[data-row]") == len(mine)
    assert count(driver, "#pareto .panel") == count(driver, "#layers .panel") == 1
    assert texts(driver, ".shown") == [f"{len(mine)} of {len(rows)} results are shown."]
    failures = [
        one for one in records if (one["status"], one["model"], one["method"]) == ("failed", "cnn-a", "wanda")
    ]
    assert count(driver, "table.failures tbody code") == len(failures)
    choose(driver, "pattern", "2:4")
    choose(driver, "sparsity", "0.7")  # no 2:4 at 70 %
    assert count(driver, "#pareto .point[data-row]") == 0
    assert texts(driver, "table.results tbody") == ["No result passes the filters."]
    click(driver, ".reset")
    assert count(driver, "table.results tbody tr") == len(rows)


@pytest.mark.slow
def test_a_filter_lives_in_the_address(opened, records):
    driver = opened()
    choose(driver, "model", "vit-b")
    fragment = driver.execute_script("return location.hash")
    driver = opened(fragment=fragment)
    expected = sum(row.model == "vit-b" for row in rows_of(records))
    assert count(driver, "table.results tbody tr") == expected


@pytest.mark.slow
def test_the_front_follows_the_filter(opened, records):
    driver = opened()
    for recipe_filter in (None, "magnitude"):
        if recipe_filter:
            choose(driver, "method", recipe_filter)
        rows = [
            row for row in rows_of(records) if row.model == "cnn-a" and recipe_filter in (None, row.method)
        ]
        best = {rows[index].recipe + show(rows[index]) for index in
                front([(row.speedup, row.kept.median) for row in rows])}  # fmt: skip
        drawn = driver.execute_script(
            "return [...document.querySelectorAll('[data-model=\"cnn-a\"] .point.front[data-row]')]"
            ".map((node) => DATA.rows[node.dataset.row]).map((row) => row.recipe + row.pattern + row.sparsity)"
        )
        assert set(drawn) == best


def show(row):
    return f"{row.pattern}{row.sparsity:g}"


@pytest.mark.slow
@pytest.mark.parametrize("x", ["speed:prefill", "file", "sparsity"])
def test_other_axes(opened, records, x):
    driver = opened()
    for name, value in (("x", x), ("y", "value"), ("shared", "no"), ("color", "allocation")):
        driver.execute_script(
            "const select = document.querySelector(`select[name=${arguments[0]}]`); select.value = arguments[1];"
            "select.dispatchEvent(new Event('change'))", name, value,
        )  # fmt: skip
    rows = [row for row in rows_of(records) if x != "speed:prefill" or row.task == "language"]
    assert count(driver, "#pareto .point[data-row]") == len(rows)
    assert set(texts(driver, "#pareto .legend button")) == {row.allocation for row in rows}
    places = driver.execute_script(
        "return [...document.querySelectorAll('#pareto circle.point[data-row]')]"
        ".map((node) => [node.cx.baseVal.value, node.cy.baseVal.value])"
    )
    assert all(30 <= x <= 300 and 0 <= y <= 200 for x, y in places)


@pytest.mark.slow
def test_a_point_leads_to_its_row_and_the_row_to_its_commands(opened, records):
    driver = opened()
    driver.execute_script("document.querySelector('#pareto [data-model=\"cnn-b\"] svg').focus()")
    press(driver, "\ue014")  # right arrow
    assert "quality kept" in texts(driver, "#tip")[0]
    recipe, setting = re.match(r"(.+), (\S+?)( \(on the front\))?$", texts(driver, "#tip b")[0]).group(1, 2)
    press(driver, "\ue007")
    row = next(row for row in rows_of(records) if row.model == "cnn-b" and row.recipe == recipe
               and setting in ("2:4" if row.pattern == "2:4" else f"{row.sparsity:.0%}"))  # fmt: skip
    assert texts(driver, "tr.found .opener") == [recipe]
    assert texts(driver, "tr.detail code") == [cell["command"] for cell in row.cells]
    assert driver.execute_script("return document.activeElement.ariaExpanded") == "true"
    press(driver, " ")
    assert count(driver, "tr.detail") == 0


@pytest.mark.slow
def test_the_command_is_copied(opened, records):
    driver = opened()
    driver.execute_cdp_cmd(
        "Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    )
    click(driver, ".opener")
    expected = texts(driver, "tr.detail code")[0]
    driver.execute_script("document.querySelector('tr.detail .copy').focus()")
    press(driver, "\ue007")
    copied = driver.execute_async_script(
        "navigator.clipboard.readText().then(arguments[0], (error) => arguments[0](String(error)))"
    )
    assert copied == expected
    assert "--cell" in copied


@pytest.mark.parametrize("size", [PHONE, DESK])
def test_nothing_makes_the_page_scroll_sideways(opened, size):
    driver = opened(size)
    click(driver, ".opener")
    driver.execute_script(
        "for (const node of document.querySelectorAll('details:not(.facet)')) node.open = true"
    )
    wide = driver.execute_script("return document.documentElement.scrollWidth")
    assert wide <= size[0]
    smallest = driver.execute_script(
        "return Math.min(...[...document.querySelectorAll('main p, main td, main button')]"
        ".map((node) => parseFloat(getComputedStyle(node).fontSize)))"
    )
    assert smallest >= 10.5
    for facet in range(count(driver, ".facet")):
        driver.execute_script("document.querySelectorAll('.facet')[arguments[0]].open = true", facet)
        assert driver.execute_script("return document.documentElement.scrollWidth") <= size[0]
        driver.execute_script("document.querySelectorAll('.facet')[arguments[0]].open = false", facet)


CONTRASTS = """
const channel = (value) => (value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
const parse = (text) => text.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => 0.2126 * channel(r / 255) + 0.7152 * channel(g / 255) + 0.0722 * channel(b / 255);
function ground(node) {
  for (let at = node; at; at = at.parentElement) {
    const color = getComputedStyle(at).backgroundColor;
    if (parse(color)[3] !== 0) return parse(color);
  }
  return [255, 255, 255];
}
const found = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const node = walker.currentNode.parentElement;
  if (!walker.currentNode.data.trim() || node.closest("script, style, noscript, [hidden], .skip, option")) continue;
  const style = getComputedStyle(node);
  const color = node.closest("svg") ? style.fill : style.color;
  const [a, b] = [light(parse(color)), light(ground(node))];
  const name = node.className.baseVal ?? node.className;
  found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), name, walker.currentNode.data.trim().slice(0, 30)]);
}
return found;
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(opened, scheme):
    driver = opened(scheme=scheme)
    click(driver, ".opener")
    found = driver.execute_script(CONTRASTS)
    assert len(found) > 500
    assert not [one for one in found if one[0] < READABLE]
    background = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) < 150) == (scheme == "dark")
