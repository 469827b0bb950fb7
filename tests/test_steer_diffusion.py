"""The scripts that steer diffusion models, on tiny pipelines of the real classes: a dictionary, a grid, a page."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_diffusion import save_pipeline

from mmsae import artifact
from mmsae.cores import Temporal, TopK
from mmsae.errors import MmsaeError
from mmsae.steering.sheet import sheet, wrapped

pytest.importorskip("diffusers")
pytest.importorskip("open_clip")
RECIPES = Path(__file__).parent.parent / "recipes"


@pytest.fixture
def script(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(RECIPES))
    monkeypatch.chdir(tmp_path)
    return lambda name: getattr(importlib.import_module(name), name)


def given(kind, point, width, tmp_path, core=TopK):
    save_pipeline(kind, tmp_path / kind, deep=kind == "sdxl")
    torch.manual_seed(0)
    artifact.save(core({point: width}, 20, k=4), tmp_path / "sae")
    return {"model": str(tmp_path / kind), "sae": str(tmp_path / "sae"), "steps": 2}


CASES = [
    ("sd", "unet.mid_block.attentions.0:delta", 32, ["a b", "c d"]),
    ("sd", "text_encoder.encoder.layers.0", 16, ["a b"]),
    ("sdxl", "unet.down_blocks.2.attentions.1:delta", 32, ["a b"]),
    ("dit", "transformer.transformer_blocks.1", 16, [0, 1]),
]


@pytest.mark.parametrize(("kind", "point", "width", "prompts"), CASES, ids=lambda value: str(value)[:20])
def test_latents_by_number_give_a_grid_and_a_page(script, tmp_path, kind, point, width, prompts):
    arguments = given(kind, point, width, tmp_path)
    script("steer_diffusion")(
        **arguments, prompts=prompts, latents=[3, 7], strengths=[0.0, 1.0, 2.0], seeds=[5], side=32, page="page.html"
    )
    grid = Image.open("runs/steer_diffusion/grid.png")
    assert grid.height > len(prompts) * 32
    page = Path("page.html").read_text()
    assert 'src="data:image/webp;base64,' in page
    assert "latents 3, 7" in page


@pytest.mark.parametrize("edit", ["clamp", "scale", "ablate", "replace", "reconstruct", "skip_block"])
def test_every_edit_of_a_block(script, tmp_path, edit):
    arguments = given("sd", "unet.mid_block.attentions.0:delta", 32, tmp_path)
    latents = None if edit in ("reconstruct", "skip_block") else [3]
    script("steer_diffusion")(
        **arguments, prompts=["a b"], latents=latents, edit=edit, strengths=[0.0, 1.0], seeds=[5], half="conditional",
        timesteps=[0, 600], box=[0, 0, 0.5, 1], out="grid.png",
    )  # fmt: skip
    assert Path("grid.png").is_file()


def test_latents_by_a_text_a_picture_and_a_transplant(script, tmp_path):
    arguments = given("sd", "unet.mid_block.attentions.0:delta", 32, tmp_path)
    Image.new("RGB", (16, 16), (200, 30, 30)).save("red.png")
    common = {**arguments, "prompts": ["a b", "c d"], "strengths": [0.0, 1.0], "seeds": [5], "out": "grid.png"}
    script("steer_diffusion")(**common, like="red.png")
    script("steer_diffusion")(**common, transplant="e f", n_latents=3)
    script("steer_diffusion")(**common, text="e", candidates=20, n_latents=1)


def test_a_dictionary_that_reads_the_timestep(script, tmp_path):
    arguments = given("sd", "unet.mid_block.attentions.0:delta", 32, tmp_path, Temporal)
    script("steer_diffusion")(**arguments, prompts=["a b"], latents=[3], strengths=[1.0], seeds=[5], out="grid.png")


def test_effects_are_ranked(script, tmp_path):
    arguments = given("sd", "unet.mid_block.attentions.0:delta", 32, tmp_path)
    Path("words.txt").write_text("red\nblue\ngreen\n")
    script("find_diffusion_features")(
        **arguments, prompts=["a b", "c d"], seeds=[5], band=[0.0001, 1.0], n_candidates=3, n_random=2,
        words="words.txt", template="a {} digit", page="page.html",
    )  # fmt: skip
    found = json.loads(Path("runs/find_diffusion_features/features.json").read_text())
    assert len(found["features"]) == 3
    order = [feature["consistency"] for feature in found["features"]]
    assert order == sorted(order, reverse=True)
    assert {feature["words"][0][0] for feature in found["features"]} <= {"red", "blue", "green"}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"latents": None}, "choose latents in one way"),
        ({"text": "x"}, "choose latents in one way"),
        ({"latents": [20]}, "names latent 20"),
        ({"latents": [1], "box": [0, 0, 1]}, "--box takes"),
        ({"latents": [1], "timesteps": [900, 100]}, "lowest and the highest"),
        ({"latents": [1], "mask": "nothing.png"}, "no picture"),
        ({"latents": [1], "sae": None}, "has no dictionary yet"),
        ({"latents": [1], "model": None}, "needs --model"),
        ({"latents": None, "like": "nothing.png"}, "is no picture"),
    ],
)
def test_what_does_not_fit_is_said(script, tmp_path, changed, says):
    arguments = given("sd", "unet.mid_block.attentions.0:delta", 32, tmp_path)
    with pytest.raises(MmsaeError, match=says):
        script("steer_diffusion")(**{**arguments, "prompts": ["a b"], "latents": [3], "seeds": [5], **changed})


def test_a_sheet_has_a_cell_for_each_picture():
    dark, bright = torch.zeros(3, 8, 8), torch.ones(3, 8, 8)
    page = sheet([[dark, bright], [bright, dark]], ["one", "two"], ["first", "second"], side=40)
    values = [page.getpixel((page.width - 84 + x, page.height - 84 + y))[0] for y in (0, 44) for x in (0, 44)]
    assert values[0] < 20
    assert values[3] < 20
    assert min(values[1:3]) > 235
    with pytest.raises(MmsaeError, match="2 rows and 1 columns"):
        sheet([[dark]], ["one"], ["first", "second"])
    from PIL import ImageFont

    assert wrapped("ablation of random latents", 60, ImageFont.load_default(13)).count("\n") >= 2
