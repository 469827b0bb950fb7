"""Results as the analyses write them, made up but of realistic shape and size."""

import base64
import io
import math
import shutil

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from mmsae.results import Plot, Result, Table

COLOURS = {"red": (225, 60, 50), "green": (60, 190, 80), "blue": (70, 110, 245), "yellow": (245, 220, 70)}
NASTY = 'a </script><b>bold</b> "seven" & more'
WORDS = ["the", "cat", "sat", "on", "warm", "mat", "while", "seven", "birds", "sang", "over", "old", "river", "rain"]


def picture(digit, colour, cell, rng):
    image = Image.fromarray(rng.integers(20, 70, 3, dtype=np.uint8)[None, None].repeat(64, 0).repeat(64, 1))
    at = (4 + 20 * (cell % 3), 20 * (cell // 3))
    ImageDraw.Draw(image).text(at, str(digit), fill=COLOURS[colour], font=ImageFont.load_default(size=20))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def scenes(n, rng):
    media, labels = [], []
    for i in range(n):
        digit, colour, cell = i % 10, list(COLOURS)[rng.integers(4)], int(rng.integers(9))
        text = NASTY if i == 7 else f"a {colour} {digit}"
        media.append({"kind": "image", "data": picture(digit, colour, cell, rng), "text": text})
        labels.append((digit, colour, cell))
    return media, labels


def heat(cell, peak, rng, side=8):
    y, x = np.mgrid[:side, :side]
    row, column = (0.5 + cell // 3) * side / 3 - 0.5, (0.5 + cell % 3) * side / 3 - 0.5
    bump = np.exp(-((y - row) ** 2 + (x - column) ** 2) / 2) + 0.08 * rng.random((side, side))
    return (peak * np.where(bump > 0.1, bump, 0)).tolist()


def entry(index, examples, rng, **more):
    top = max(e["activation"] for e in examples)
    edges = np.linspace(0, top, 21)
    counts = (4000 * np.exp(-np.arange(20) / 2.5)).astype(int) + (np.arange(20) == 19)
    density = float(10 ** rng.uniform(-3.5, -1))
    shape = {"edges": edges.tolist(), "counts": counts.tolist()}
    base = {"id": index, "density": density, "mean": 0.3 * top, "max": top, "histogram": shape}
    return base | {"factor": None, "captions": [], "label": "", "examples": examples} | more


def top_pictures(n_latents, n_media, rng):
    media, labels = scenes(n_media, rng)
    latents = []
    for i in range(n_latents):
        digit, colour = i % 10, list(COLOURS)[i % 4]
        by_digit = i % 3 != 0
        hits = [j for j, (d, c, _) in enumerate(labels) if (d == digit if by_digit else c == colour)]
        hits = rng.permutation(hits)[:9]
        values = sorted((float(v) for v in rng.uniform(1, 6, len(hits))), reverse=True)
        examples = [
            {"media": int(j), "sample": int(j), "activation": v, "position": 5, "values": None,
             "heat": heat(labels[j][2], v, rng) if i % 7 else None}
            for j, v in zip(hits, values, strict=True)
        ]  # fmt: skip
        auroc = float(1 - 0.4 * rng.random() ** 2)
        name, value = ("digit", str(digit)) if by_digit else ("colour", colour)
        factor = {"name": name, "value": value, "auroc": auroc, "f1": float(auroc - 0.1)} if i % 5 else None
        captions = [{"text": media[int(j)]["text"], "score": 0.4 - 0.05 * r} for r, j in enumerate(hits[:5])]
        latents.append(entry(i * 7 % 4096, examples, rng, factor=factor, captions=captions))
    latents[1]["captions"].insert(0, {"text": NASTY, "score": 0.41})
    return Result("TopExamples", "What the latents respond to", latents=latents, media=media)


def top_texts(n_latents, rng):
    media, latents = [], []
    for i in range(n_latents):
        word, examples = WORDS[i % len(WORDS)], []
        for rank in range(6):
            tokens = [" " + str(w) for w in rng.choice(WORDS, 40)]
            tokens[int(rng.integers(40))] = " " + word
            values = [(8 - rank) * (1 if t == " " + word else 0.0 if rng.random() < 0.85 else 0.2) for t in tokens]
            media.append({"kind": "text", "tokens": tokens})
            examples.append({"media": len(media) - 1, "sample": rank, "activation": max(values), "position": 3,
                             "heat": None, "values": values})  # fmt: skip
        latents.append(entry(i, examples, rng, label=f"the word “{word}”"))
    return Result("TopTexts", "What the latents read", latents=latents, media=media)


def measured():
    """The results without pictures: curves, histogram, tables, numbers."""
    steps = list(range(0, 20_001, 250))
    fall = [0.12 + 0.88 * math.exp(-s / 2500) for s in steps]
    losses = [
        {"label": "train", "x": steps, "y": fall},
        {"label": "validation", "x": steps, "y": [f + 0.006 for f in fall]},
    ]
    training = Result("Training", "FVU settles at 0.12 after 15k steps", plots=[
        Plot("Reconstruction error halves every 1,700 steps", "step", "FVU (share of variance)",
             losses, log="y"),
        Plot("L0 stays at its target", "step", "L0 (active latents per token)",
             [{"label": "", "x": steps, "y": [32 + 20 * math.exp(-s / 900) for s in steps]}]),
    ])  # fmt: skip
    edges = np.logspace(-5, 0, 41)
    counts = (300 * np.exp(-((np.log10(edges[:-1]) + 2.3) ** 2) / 0.5)).astype(int)
    fidelity = Result(
        "Fidelity", "At 32 latents per token the dictionary keeps 88 % of the variance",
        numbers={"fvu": 0.1213, "explained_variance": 0.8787, "l0": 32.0, "dead_fraction": 0.0213},
        plots=[Plot("Most latents are active on 0.1 to 2 % of tokens", "density (share of tokens)", "latents",
                    [{"label": "", "x": edges.tolist(), "y": counts.tolist()}], kind="bars", log="x")],
        settings={"n_rows": 131072, "headline": [
            {"label": "FVU", "value": "0.121", "note": "PCA at the same L0 0.31"},
            {"label": "L0", "value": "32.0", "note": "of 4,096 latents"},
            {"label": "Dead latents", "value": "2.1 %", "note": "never active on 131k rows"},
        ]},
    )  # fmt: skip
    factors = [("digit", str(d)) for d in range(10)] + [("colour", c) for c in COLOURS]
    factors += [("position", f"cell {c}") for c in range(9)]
    methods = ["dictionary", "raw neurons", "PCA", "random dictionary"]
    dead = [0.0213, None, None, 0.4]
    recovery = Result(
        "FactorRecovery", "Single latents name a factor better than neurons or PCA do",
        tables=[
            Table("Best single unit per factor value, mean over 23 values",
                  ["method", "F1 ↑", "AUROC ↑", "units", "dead ↓"],
                  [[m, 0.83 - 0.17 * i, 0.962 - 0.07 * i, 4096, dead[i]] for i, m in enumerate(methods)]),
            Table("By factor value", ["factor", "value", "latent", "F1 ↑", "AUROC ↑", "share of rows"],
                  [[f, v, 37 * i, 0.95 - 0.02 * i, 0.99 - 0.01 * i, 0.1] for i, (f, v) in enumerate(factors)]),
        ],
        settings={"headline": [{"label": "Mean best F1", "value": "0.830", "note": "raw neurons 0.660, PCA 0.490"}]},
    )  # fmt: skip
    columns = ["task", "chance", "clean", "spliced", "mean-ablated", "recovered ↑"]
    accuracy = [
        ["digit", 0.1, 0.942, 0.912, 0.113, 0.964],
        ["colour", 0.125, 0.991, 0.988, 0.131, 0.997],
        ["position", 1 / 9, 0.713, float("nan"), 0.12, None],
    ]
    downstream = Result(
        "Downstream", "Splicing the reconstruction in keeps 96 % of zero-shot accuracy",
        tables=[Table("Zero-shot accuracy", columns, accuracy)],
        settings={"headline": [{"label": "Downstream recovered", "value": "96.4 %", "note": "mean ablation 0 %"}]},
    )  # fmt: skip
    numbers, settings = {"score": 0.5, "nothing": float("nan")}, {"list": [1, 2], "deep": {"a": 1}}
    mystery = Result("SomethingNew", numbers=numbers, settings=settings)
    return [training, fidelity, recovery, downstream, mystery]


FACTS = {
    "Model": "scene CLIP, vision tower",
    "Hook point": "blocks.5.hook_resid",
    "Dictionary": "TopK, 4,096 latents, k = 32",
    "Activations": "512k training, 131k evaluation",
    "Date": "2026-11-22",
}


@pytest.fixture(scope="session")
def results():
    rng = np.random.default_rng(0)
    return [*measured(), top_pictures(60, 120, rng)]


@pytest.fixture(scope="session")
def text_results():
    return [*measured()[:2], top_texts(24, np.random.default_rng(1))]


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    chromium, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no chromium with chromedriver on this machine")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for switch in ("headless=new", "no-sandbox", "disable-gpu", "disable-background-networking", "disable-sync",
                   "disable-component-update", "no-first-run", "force-prefers-reduced-motion", "window-size=1280,900",
                   f"user-data-dir={tmp_path_factory.mktemp('profile')}"):  # fmt: skip
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()
