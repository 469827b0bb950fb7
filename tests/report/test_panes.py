"""Each kind of medium in a real browser, from a LatentStore through TopExamples to what is on the screen."""

import math
import re

import modalities
import pytest
from browsing import clean, css, load, press, until

from mmsae.report.page import write_report


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("panes")
    made = {}

    def page(name):
        if name not in made:
            made[name] = write_report([modalities.ALL[name]()], folder / f"{name.replace(' ', '-')}.html", name, {})
        return made[name]

    return page


def opened(browser, page, latent=0):
    load(browser, page, f"#latent-{latent}")
    return until(lambda: css(browser, "#detail .examples > figure"))


def number(element, name):
    return float(element.get_attribute(name))


@pytest.mark.parametrize("name", modalities.ALL)
def test_every_kind_is_drawn_without_complaint(browser, pages, name):
    figures = opened(browser, pages(name))
    assert all(figure.size["height"] > 20 for figure in figures)
    assert clean(browser)
    load(browser, pages(name), "#latents")
    assert css(browser, ".card .montage .picture, .card .snippets > *")
    assert clean(browser)


@pytest.mark.parametrize("name", ["audio", "ecg", "eeg", "masks", "boxes", "diffusion", "pairs", "sound pairs"])
def test_narrow_windows_do_not_scroll_sideways(browser, pages, name):
    size = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    opened(browser, pages(name))
    fits = "const d = document.getElementById('detail-body'); return d.scrollWidth <= d.clientWidth"
    assert browser.execute_script(fits)
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


WATCH = """window.started = []; window.stopped = 0;
const start = AudioBufferSourceNode.prototype.start, stop = AudioBufferSourceNode.prototype.stop;
AudioBufferSourceNode.prototype.start = function (...given) {
  const loudest = this.buffer.getChannelData(0).reduce((a, b) => Math.max(a, b));
  window.started.push([given[1], given[2], this.buffer.duration, loudest]);
  window.context = this.context;
  return start.apply(this, given);
};
AudioBufferSourceNode.prototype.stop = function (...given) { window.stopped++; return stop.apply(this, given); };"""


def test_play_buttons_play_all_and_the_active_region(browser, pages):
    from selenium.webdriver.common.keys import Keys

    opened(browser, pages("audio"))
    browser.execute_script(WATCH)
    everything, region = css(browser, "#detail figure:first-child .play")
    assert region.text == "Play active region, 1.50 to 2 s"
    everything.click()
    (begin, length, duration, loudest) = browser.execute_script("return started[0]")
    assert (begin, length, duration) == (0, 4, 4)
    assert 0.45 < loudest < 0.6
    assert everything.get_attribute("aria-pressed") == "true"
    until(lambda: browser.execute_script("return context.state") == "running")
    head = css(browser, "#detail .playhead")[0]
    until(lambda: head.get_attribute("visibility") == "visible" and number(head, "x1") > 53)

    region.send_keys(Keys.SPACE)  # by keyboard; what played before ends
    assert browser.execute_script("return started[1].slice(0, 2)") == pytest.approx([1.5, 0.5])
    assert browser.execute_script("return stopped") == 1
    assert everything.get_attribute("aria-pressed") == "false"
    until(lambda: region.get_attribute("aria-pressed") == "false")  # after half a second it is over
    assert head.get_attribute("visibility") == "hidden"

    everything.click()
    before = browser.execute_script("return stopped")
    press(browser, Keys.ESCAPE)
    until(lambda: browser.execute_script("return stopped") == before + 1)  # closing the latent ends its sound
    assert clean(browser)


@pytest.mark.parametrize(("name", "low", "high"), [("audio", 50, 14_000), ("audio without bands", 0, 24_000)])
def test_active_cells_lie_at_their_time_and_frequency(browser, pages, name, low, high):
    opened(browser, pages(name))
    svg = css(browser, "#detail .spectrum")[0]
    image = svg.find_element("css selector", "image")
    left, width = number(image, "x"), number(image, "width")
    top, height = number(image, "y"), number(image, "height")
    strong, weak = svg.find_elements("css selector", ".shade rect")
    assert (number(strong, "x") - left) / width == pytest.approx(1.5 / 4)
    assert (number(weak, "x") - left) / width == pytest.approx(2 / 4)
    assert number(strong, "width") / width == pytest.approx(0.5 / 4)
    assert number(strong, "fill-opacity") > number(weak, "fill-opacity")
    mel = [2595 * math.log10(1 + hz / 700) for hz in (low, high, 24_000)]
    edges = [(mel[0] + (mel[1] - mel[0]) * band / 4) / mel[2] for band in (1, 2)]
    assert 1 - (number(strong, "y") - top) / height == pytest.approx(edges[1], abs=1e-3)
    assert number(strong, "height") / height == pytest.approx(edges[1] - edges[0], abs=1e-3)
    region = svg.find_element("css selector", ".region")
    assert (number(region, "x") - left) / width == pytest.approx(1.5 / 4)
    assert number(region, "width") / width == pytest.approx(0.5 / 4)
    assert "active 1.50 to 2 s: 5.00" in svg.get_attribute("aria-label")
    said = css(browser, "#detail figcaption")[0].text
    assert ("equal parts of the mel scale" in said) == (name == "audio without bands")


def test_ecg_is_on_paper_at_its_scale(browser, pages):
    opened(browser, pages("ecg"))
    svg = until(lambda: css(browser, "#detail .ecg:has(.trace)"))[0]
    assert "25 mm/s, 10 mm/mV" in css(browser, "#detail figcaption")[0].text
    sheet = svg.find_element("css selector", ".sheet")
    assert number(sheet, "width") == pytest.approx(250)  # ten seconds at 25 mm/s
    small = svg.find_element("css selector", ".small-squares").get_attribute("d")
    assert small.count("V") == 251  # a line each millimetre
    assert svg.find_element("css selector", ".large-squares").get_attribute("d").count("V") == 51
    left = number(sheet, "x")
    shades = svg.find_elements("css selector", ".shade rect")
    assert [number(s, "x") - left for s in shades] == pytest.approx([50, 60])  # 2.0 and 2.4 s
    assert all(number(s, "width") == pytest.approx(10) for s in shades)
    assert all(number(s, "height") == number(sheet, "height") for s in shades)  # all leads
    path = svg.find_elements("css selector", ".trace")[1].get_attribute("d")
    beats = [float(y) for y in re.findall(r" (-?[\d.]+)", path)]
    peak = max(modalities.beats(10)[1]) - sorted(modalities.beats(10)[1])[2500]
    assert sorted(beats)[1250] - min(beats) == pytest.approx(10 * peak, abs=0.4)  # 10 mm/mV, above the median
    assert len(svg.find_elements("css selector", ".channel")) == 12
    label = svg.get_attribute("aria-label")
    assert "12 channels" in label
    assert "PVC at 2.3 s" in label
    event = svg.find_element("css selector", ".event rect")
    assert number(event, "x") - left == pytest.approx(2.3 * 25, abs=0.1)


def test_windows_of_one_channel_shade_that_channel(browser, pages):
    opened(browser, pages("ecg"), 1)
    svg = until(lambda: css(browser, "#detail .ecg:has(.trace)"))[0]
    shades = svg.find_elements("css selector", ".shade rect")
    assert len(shades) == 25
    sheet = svg.find_element("css selector", ".sheet")
    row = number(sheet, "height") / 12
    assert {round(number(s, "y"), 2) for s in shades} == {round(number(sheet, "y") + 7 * row, 2)}
    assert {round(number(s, "height"), 2) for s in shades} == {round(row, 2)}
    opacity = [number(s, "fill-opacity") for s in shades]
    assert opacity[:4] == pytest.approx([0.325, 0.55, 0.325, 0.55])
    assert shades[1].get_attribute("textContent") == "V2, 0.4 s to 0.8 s: 1.00"


def test_names_of_dense_events_do_not_overlap(browser, tmp_path):
    rendered = {"kind": "signal", "values": modalities.beats(6.0), "rate": 500, "channels": modalities.LEADS}
    rendered |= {"unit": "mV", "text": ""}
    rendered["events"] = [[0.3 * i, 0.3 * i + 0.1, "ventricular" if i % 3 else "normal"] for i in range(20)]
    columns = {"sample_id": [0], "start_s": [1.0], "duration_s": [0.5], "channel": [-1]}
    page = write_report([modalities.top([rendered], [[1.0]], columns)], tmp_path / "dense.html", "dense", {})
    opened(browser, page)
    until(lambda: css(browser, "#detail .event"))
    assert len(css(browser, "#detail .event line")) == 20
    boxes = [text.rect for text in css(browser, "#detail .event text")]
    assert len(boxes) > 5
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            apart = b["x"] + b["width"] <= a["x"] + 1 or abs(a["y"] - b["y"]) >= 0.9 * a["height"] / 1.3
            assert apart, (a, b)
    assert "and 12 more" in css(browser, "#detail figcaption")[0].text


def test_windows_can_be_hidden(browser, pages):
    opened(browser, pages("ecg"))
    shade = until(lambda: css(browser, "#detail .shade"))[0]
    assert shade.value_of_css_property("opacity") == "1"
    css(browser, "#overlay")[0].click()
    until(lambda: shade.value_of_css_property("opacity") == "0")


def test_long_eeg_is_cut_around_where_the_latent_fires(browser, pages):
    opened(browser, pages("eeg"))
    svg = until(lambda: css(browser, "#detail .eeg:has(.trace)"))[0]
    assert "12 s to 22 s of 30 s" in css(browser, "#detail figcaption")[0].text
    assert "active 17.00 to 18 s in O1: 3.00" in svg.get_attribute("aria-label")
    sheet = svg.find_element("css selector", ".sheet")
    shades = svg.find_elements("css selector", ".shade rect")
    assert [number(s, "x") - number(sheet, "x") for s in shades] == pytest.approx([125, 125, 150])
    assert re.fullmatch(r"\d+ µV", svg.find_elements("css selector", "text")[-1].text)
    assert "stimulus at 15 s" in svg.get_attribute("aria-label")


def test_a_gap_lifts_the_pen(browser, tmp_path):
    page = write_report([modalities.eeg(8.0, at=3)], tmp_path / "gap.html", "gap", {})
    opened(browser, page)
    until(lambda: css(browser, "#detail .trace"))
    strokes = [trace.get_attribute("d").count("M") for trace in css(browser, "#detail .trace")]
    assert strokes[3] == 2
    assert strokes[4] == 1


def test_mask_is_beside_the_heat_map_with_shares(browser, pages):
    opened(browser, pages("masks"))
    figure = css(browser, "#detail figure")[0]
    pictures = figure.find_elements("css selector", ".picture")
    assert pictures[0].find_elements("css selector", ".heat")
    assert pictures[1].find_elements("css selector", ".mask")
    assert pictures[0].location["y"] == pictures[1].location["y"]
    lines = [line.text.split("\n") for line in figure.find_elements("css selector", ".legend li")]
    assert [line[0] for line in lines] == ["activation", "background", "cytoplasm", "nucleus"]
    shares = [float(line[1].removesuffix(" %")) for line in lines[1:]]
    assert sum(shares) == pytest.approx(100, abs=1.5)
    assert shares[2] > 50


@pytest.mark.parametrize("name", ["image_text", "boxes"])
def test_picture_and_words_side_by_side(browser, pages, name):
    opened(browser, pages(name))
    figure = css(browser, "#detail figure")[0]
    picture, text = (figure.find_element("css selector", s) for s in (".picture", ".passage"))
    assert text.location["x"] > picture.location["x"] + picture.size["width"]
    assert picture.size["width"] / picture.size["height"] == pytest.approx(1.5, rel=0.02)  # as the picture, not square
    marks = figure.find_elements("css selector", "mark")
    assert [mark.get_attribute("title") for mark in marks] == ["red: 3.00", "red: 4.00"]
    heat = figure.find_element("css selector", ".heat")
    columns, rows = {"image_text": (6, 4), "boxes": (48, 32)}[name]
    green = """const c = arguments[0], d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
        return [c.width, c.height, Array.from({length: d.length / 4}, (_, i) => d[4 * i])]"""
    width, height, red = browser.execute_script(green, heat)
    assert (width, height) == (columns, rows)
    hot = {(i % width, i // width) for i, level in enumerate(red) if level > 100}
    below = 2 if name == "image_text" else 22
    assert hot == {(x, y) for x in range(2 * columns // 3, columns) for y in range(below)}
    assert "in picture and text" in figure.text
    assert "in the picture" in css(browser, "#detail figure")[1].text


def test_profile_over_timesteps(browser, pages):
    opened(browser, pages("diffusion"))
    svg = css(browser, "#detail .profile")[0]
    label = svg.get_attribute("aria-label")
    # one of 36 patches fires, with 2 * timestep / 100, on two samples with 1 and 1.1
    expected = {t: 2 * t / 100 * 1.05 / 36 for t in modalities.STEPS}
    conditional = re.search(r"conditional: (.*?)\. unconditional", label)[1]
    found = {int(t): float(v.replace("−", "-")) for v, t in (entry.split(" at ") for entry in conditional.split(", "))}
    assert found == pytest.approx(expected, rel=0.02)
    dots = [(number(d, "cx"), number(d, "cy")) for d in svg.find_elements("css selector", "circle")]
    assert len(dots) == 10
    assert dots[4][1] < dots[9][1]  # with the prompt it is above
    assert [y for _, y in dots[:5]] == sorted((y for _, y in dots[:5]), reverse=True)
    assert "timestep 801, σ 1.6, conditional" in css(browser, "#detail figcaption")[0].text


def test_diffusion_without_picture_shows_the_map(browser, pages):
    opened(browser, pages("diffusion without image"))
    assert not css(browser, "#detail img")
    assert css(browser, "#detail .bare .heat")[0].size["height"] > 50
    assert css(browser, ".card .heat")  # on the card, too, without asking


def test_roles_stand_before_their_turns(browser, pages):
    opened(browser, pages("dialogue"))
    text = css(browser, "#detail .passage")[0]
    assert [r.text for r in text.find_elements("css selector", ".role")] == ["user", "assistant"]
    assert re.sub(r"\s+", "", text.text) == "userHowmanymoonshasMars?assistantTwomoons:PhobosandDeimos."
    assert [m.get_attribute("title") for m in text.find_elements("css selector", "mark")] == [
        "moons: 2.00", "moons: 3.00", "Phobos: 1.00",
    ]  # fmt: skip
    assert len(css(browser, ".card .role")) == 2


def test_a_full_page_says_what_it_left_out(browser, tmp_path):
    page = write_report([modalities.audio(megabytes=0.25)], tmp_path / "full.html", "full", {})
    assert page.stat().st_size < 500_000
    opened(browser, page)
    assert len(css(browser, "#detail .spectrum")) == 3
    assert len(css(browser, "#detail .player")) == 1  # the strongest example keeps its sound
    assert "not stored" in css(browser, "#detail figure")[1].text
    assert clean(browser)


def test_concept_sets_stand_side_by_side(browser, pages):
    load(browser, pages("pairs"), "#latent-0")
    sets = until(lambda: css(browser, "#detail .set > section"))
    assert [s.find_element("css selector", "h3").text for s in sets] == ["Strongest pictures", "Strongest captions"]
    assert abs(sets[0].location["y"] - sets[1].location["y"]) < 1
    assert sets[0].location["x"] + sets[0].size["width"] <= sets[1].location["x"]
    assert len(sets[0].find_elements("css selector", "figure img")) == 3
    said = [reading.text.split("\n") for reading in sets[1].find_elements("css selector", ".reading")]
    assert said == [["1.60", "a red ball, take 6"], ["1.30", "a red ball, take 3"], ["1.00", "a red ball, take 0"]]
    assert "fires on 33 %" in sets[0].text
    assert css(browser, "#detail aside .figures")[0].text.split("\n")[:2] == ["Balance", "1.00"]


def test_a_latent_of_one_modality_says_so_and_sorts_last_by_balance(browser, pages):
    load(browser, pages("pairs"), "#latents")
    cards = until(lambda: css(browser, ".card"))
    texts = {card.get_attribute("href").rpartition("-")[2]: card.text for card in cards}
    assert "silent: captions" in texts["1"]
    assert "silent: pictures" in texts["2"]
    assert "a red ball, take 6" in texts["0"]
    assert len(css(browser, "a[href='#latent-0'] .montage .picture")) == 3
    sort = css(browser, "#sort option")
    next(option for option in sort if option.text == "Balance").click()
    order = until(lambda: [card.get_attribute("href").rpartition("-")[2] for card in css(browser, ".card")])
    assert order == ["0", "1", "2"]
    css(browser, "#order")[0].click()
    order = [card.get_attribute("href").rpartition("-")[2] for card in css(browser, ".card")]
    assert order == ["1", "2", "0"]
    load(browser, pages("pairs"), "#latent-1")
    assert until(lambda: "It is silent here." in css(browser, "#detail")[0].text)
    assert clean(browser)


def test_sounds_stand_beside_captions_and_play(browser, pages):
    load(browser, pages("sound pairs"), "#latent-0")
    sets = until(lambda: css(browser, "#detail .set > section"))
    assert [s.find_element("css selector", "h3").text for s in sets] == ["Strongest sounds", "Strongest captions"]
    assert len(sets[0].find_elements("css selector", ".play")) == 3
    assert "a beep and a siren, take 6" in sets[1].text
