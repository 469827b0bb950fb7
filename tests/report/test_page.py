import json
import re
import subprocess
import sys

import pytest
from browsing import clean, css, load, press, until
from conftest import FACTS, NASTY

from mmsae.errors import MmsaeError
from mmsae.report.page import render, write_report
from mmsae.results import Result


@pytest.fixture(scope="session")
def page(results, tmp_path_factory):
    return write_report(results, tmp_path_factory.mktemp("report") / "report.html", "TopK on scene CLIP", FACTS)


@pytest.fixture(scope="session")
def text_page(text_results, tmp_path_factory):
    return write_report(text_results, tmp_path_factory.mktemp("report") / "report.html", "TopK on text", FACTS)


def stored(html):
    return json.loads(re.search(r'id="data">(.*?)</script>', html, re.S)[1])


def test_every_result_is_shown(page, results):
    html = page.read_text()
    for result in results[:-1]:
        assert (result.title or "Something new") in html.replace("\u00a0%", " %")
        for table in result.tables:
            assert table.title in html
    assert html.count('<svg viewBox="0 0') == sum(len(r.plots) for r in results)
    assert "PCA at the same L0 0.31" in html
    assert ">scene CLIP, vision tower<" in html
    assert "0.830" in html  # a number of the table, at the table's precision


def test_captions_cannot_leave_the_data(page, results):
    html = page.read_text()
    assert html.count("</script>") == 2
    assert "<b>bold" not in html
    data = stored(html)
    assert NASTY in [c["text"] for latent in data["latents"] for c in latent["captions"]]
    assert data["latents"][1]["captions"][0]["text"] == NASTY
    nasty = render([Result("X", title=NASTY)], NASTY, {NASTY: NASTY})
    assert "<b>bold" not in nasty
    assert nasty.count("</script>") == 2


def test_nothing_is_fetched_from_elsewhere(page):
    html = page.read_text()
    links = set(re.findall(r'(?:src|href)="([^"#]*)"', html))
    assert links <= {"", "data:,"}
    assert "@import" not in html
    assert "default-src 'none'" in html


def test_picture_by_address_is_shown_by_its_text():
    example = {"media": 0, "sample": 0, "activation": 1.0, "position": 0, "heat": None, "values": None}
    latent = {"id": 0, "density": 0.1, "mean": 1.0, "max": 1.0, "examples": [example]}
    medium = {"kind": "image", "data": "https://example.org/cat.png", "text": "a cat"}
    html = render([Result("TopExamples", latents=[latent], media=[medium])], "t", {})
    assert "example.org" not in html
    assert stored(html)["media"] == [{"kind": "other", "text": "a cat"}]


def test_only_media_in_use_are_stored(results):
    top = results[-1]
    cut = Result("TopExamples", latents=top.latents[:2], media=top.media)
    data = stored(render([cut], "t", {}))
    used = {e["media"] for latent in cut.latents for e in latent["examples"]}
    assert len(data["media"]) == len(used) < len(top.media)
    first = data["latents"][0]["examples"][0]
    assert data["media"][first["media"]] == top.media[cut.latents[0]["examples"][0]["media"]]


def test_same_results_same_page(page, results):
    assert render(results, "TopK on scene CLIP", FACTS) == page.read_text()


def test_broken_numbers_do_not_break_the_page():
    nan = float("nan")
    factor = {"name": "a", "value": "b", "auroc": nan, "f1": nan}
    latent = {"id": 3, "density": nan, "mean": nan, "max": nan, "factor": factor}
    assert stored(render([Result("T", latents=[latent])], "t", {}))["latents"][0]["max"] is None


def test_writing_is_whole_or_not_at_all(tmp_path, results):
    target = tmp_path / "deep" / "report.html"
    write_report(results[:1], target, "one", {})
    before = target.read_bytes()
    with pytest.raises(TypeError):
        write_report([Result("T", latents=[{"id": 0, "label": object()}])], target, "two", {})
    assert target.read_bytes() == before
    assert [p.name for p in target.parent.iterdir()] == ["report.html"]


def test_no_result_is_said(tmp_path):
    with pytest.raises(MmsaeError, match="mmsae evaluate"):
        write_report([], tmp_path / "report.html", "t", {})


def test_report_needs_no_torch():
    code = "import sys, mmsae.report.page; sys.exit('torch' in sys.modules or 'matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---- in a browser -------------------------------------------------------------------------------------------------


def ids(browser):
    return browser.execute_script("return [...document.querySelectorAll('.card')].map(a => a.getAttribute('href'))")


def test_card_opens_and_keys_walk(browser, page):
    from selenium.webdriver.common.keys import Keys

    load(browser, page, "#latents")
    cards = css(browser, ".card")
    assert len(css(browser, ".card img")) >= 9
    order = ids(browser)
    browser.execute_script("arguments[0].scrollIntoView({behavior: 'instant', block: 'center'})", cards[0])
    cards[0].click()
    title = until(lambda: css(browser, "dialog[open] h2"))[0]
    assert f"#latent-{title.text.split()[1]}" == order[0]
    assert css(browser, "#detail .histogram rect")
    assert css(browser, "#detail .examples img")

    press(browser, Keys.ARROW_RIGHT)
    until(lambda: browser.current_url.endswith(order[1]))
    press(browser, Keys.ARROW_LEFT)
    until(lambda: browser.current_url.endswith(order[0]))
    press(browser, Keys.ESCAPE)
    until(lambda: not css(browser, "dialog[open]"))
    assert browser.switch_to.active_element.get_attribute("href").endswith(order[0])
    assert clean(browser)


def test_link_opens_a_latent_with_its_heat_map(browser, page):
    load(browser, page, "#latent-7")
    assert until(lambda: css(browser, "dialog[open] h2"))[0].text == "Latent 7"
    assert NASTY in css(browser, "#detail .captions")[0].text
    heat = css(browser, "#detail .heat")[0]
    until(lambda: heat.value_of_css_property("opacity") == "1")
    css(browser, "#overlay")[0].click()
    until(lambda: heat.value_of_css_property("opacity") == "0")
    peak = browser.execute_script("return JSON.parse(document.getElementById('data').textContent).latents[1].peak")
    assert css(browser, ".scale")[0].text.split()[-1] == f"{peak:.2f}"
    brightest = """const c = arguments[0], d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
        return Math.max(...Array.from({length: d.length / 4}, (_, i) => d[4 * i + 1]))"""
    assert browser.execute_script(brightest, heat) > 150  # the strongest patch of the strongest example is at the top
    assert clean(browser)


def test_search_sort_and_filter(browser, page):
    load(browser, page, "#latents")
    search = css(browser, "#search")[0]
    count = css(browser, "#count")[0]
    assert count.text == "60 latents"
    search.send_keys("</script><b>bold")
    until(lambda: "of 60" in count.text)
    assert "#latent-7" in ids(browser)
    search.clear()
    search.send_keys("49")
    until(lambda: ids(browser)[:1] == ["#latent-49"])
    search.clear()
    search.send_keys("nothing has this")
    until(lambda: css(browser, "#empty")[0].is_displayed())
    css(browser, "#reset")[0].click()
    until(lambda: count.text == "60 latents")

    choose = "const s = window[arguments[0]]; s.value = arguments[1]; s.dispatchEvent(new Event('change'))"
    browser.execute_script(choose, "sort", "id")
    down = ids(browser)
    assert down[0] == "#latent-413"
    css(browser, "#order")[0].click()
    assert ids(browser)[0] == "#latent-0"
    browser.execute_script(choose, "factor", '["colour","red"]')
    assert all("red" in c.text for c in css(browser, ".card"))
    assert 0 < len(ids(browser)) < 20
    assert clean(browser)


def test_all_cards_come_by_scrolling(browser, page):
    load(browser, page)
    assert len(ids(browser)) < 60
    browser.execute_script("window.scrollTo({top: 1e6, behavior: 'instant'})")
    until(lambda: len(ids(browser)) == 60)


def test_table_sorts_by_its_heading(browser, page):
    load(browser, page)
    cells = "return [...document.querySelectorAll('table')[1].tBodies[0].rows].map(r => r.cells[3].textContent)"
    heading = css(browser, "table")[1].find_elements("css selector", "th button")[3]
    browser.execute_script("arguments[0].click(); arguments[0].click()", heading)
    values = [float(v) for v in browser.execute_script(cells)]
    assert values == sorted(values)
    assert heading.find_element("xpath", "..").get_attribute("aria-sort") == "ascending"


def test_text_is_shaded_by_activation(browser, text_page):
    load(browser, text_page, "#latent-3")
    marks = until(lambda: css(browser, "#detail mark"))
    strong = [m for m in marks if "100%" in m.get_attribute("style")]
    assert strong[0].text == "on"
    assert strong[0].get_attribute("title") == "on: 8.00"
    assert clean(browser)


@pytest.mark.parametrize("address", ["", "#latent-7"])
def test_narrow_window_does_not_scroll_sideways(browser, page, address):
    size = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    load(browser, page, address)
    assert browser.execute_script("return [innerWidth, document.documentElement.scrollWidth <= innerWidth]") == [
        400,
        True,
    ]
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_theme_changes_and_stays(browser, page):
    load(browser, page)
    colour = "return getComputedStyle(document.body).backgroundColor"
    button = css(browser, "#theme")[0]
    button.click()
    light = browser.execute_script(colour)
    button.click()
    dark = browser.execute_script(colour)
    assert light != dark
    browser.refresh()
    assert browser.execute_script(colour) == dark
    css(browser, "#theme")[0].click()
