"""Drawing with interventions: the same noise, words alone, transplants, effects, and what a CLIP says of them."""

import numpy as np
import pytest
import torch
from tiny_diffusion import KINDS, items_for, save_pipeline
from torch.testing import assert_close

from mmsae.cores import Temporal, TopK
from mmsae.errors import MmsaeError
from mmsae.hooks import capture
from mmsae.latents import LatentStore
from mmsae.miniatures.scene_diffusion import DrawnScenes
from mmsae.sources import Diffusion
from mmsae.steering import (
    Add,
    Box,
    Content,
    Intervention,
    Mask,
    PictureJudge,
    Scale,
    Stage,
    Steps,
    Transplant,
    by_effect,
    discover,
    draw,
    effect_of,
    in_band,
    steer,
    trace,
)
from mmsae.steering.effects import describe
from mmsae.steering.transplant import _moved, transport_scores

pytest.importorskip("diffusers")
M = 24
POINTS = {
    "sd": "unet.mid_block.attentions.0:delta",
    "sdxl": "unet.up_blocks.0.attentions.1:delta",
    "dit": "transformer.transformer_blocks.1",
    "pixart": "transformer.transformer_blocks.1:delta",
    "sd3": "transformer.transformer_blocks.0:delta[1]",
    "flux": "transformer.transformer_blocks.1:delta[1]",
}
SCENE = "unet.up_blocks.0.attentions.1"


def core_of(width, kind=TopK, **arguments):
    torch.manual_seed(0)
    return kind(width, M, k=6, **arguments).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    made = {}

    def get(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            save_pipeline(kind, folder)
            size = {"size": 16} if kind == "flux" else {}
            source = Diffusion(folder, [POINTS[kind]], steps=3, device="cpu", **size)
            made[kind] = source, source.spec.d_in
        return made[kind]

    return get


@pytest.fixture(scope="module")
def scenes():
    return Diffusion("miniature:diffusion", [SCENE], steps=3, device="cpu")


# ---- drawing


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_is_the_noise_whatever_is_steered(pipelines, kind):
    source, width = pipelines(kind)
    items = items_for(kind)
    clean = draw(source, items, [3, 4])
    assert clean.shape[:2] == (2, 3)
    assert clean.min() >= 0
    assert clean.max() <= 1
    assert torch.equal(draw(source, items, [3, 4]), clean)
    assert not torch.equal(draw(source, items, [3, 5])[1], clean[1])
    core = core_of(width)
    assert torch.equal(draw(source, items, [3, 4], [Intervention(core, POINTS[kind], [Scale(1, 1.0)])]), clean)
    pushed = draw(source, items, [3, 4], [Intervention(core, POINTS[kind], [Add(1, 40.0)])])
    assert not torch.allclose(pushed, clean, atol=1e-3)


def test_the_seed_is_the_one_that_diffusers_is_given(pipelines):
    source, _ = pipelines("sd")
    item = items_for("sd")[0]
    theirs = source.pipe(
        item["text"], num_inference_steps=3, generator=torch.Generator().manual_seed(7), output_type="pt"
    )
    assert_close(draw(source, [item], [7])[0], theirs.images[0].float(), atol=1e-6, rtol=0)


def test_prompts_and_seeds_have_to_be_as_many(scenes):
    with pytest.raises(MmsaeError, match="2 prompts and 1 seeds"):
        draw(scenes, ["a red two", "a blue one"], [0])


def test_an_exception_in_the_middle_leaves_the_model_bit_for_bit(scenes):
    prompts, seeds = ["a red two at the top", "a blue one at the left"], [0, 1]
    clean = draw(scenes, prompts, seeds)

    def fails(context):
        if context.step == 1:
            raise ZeroDivisionError
        return torch.ones(1, 1, dtype=torch.bool)

    with pytest.raises(ZeroDivisionError):
        draw(scenes, prompts, seeds, [Intervention(core_of(128), SCENE, [Add(0, 5.0)], fails)])
    assert torch.equal(draw(scenes, prompts, seeds), clean)
    zero = Intervention(core_of(128), SCENE, [Add(0, 0.0), Scale(1, 1.0)])
    assert torch.equal(draw(scenes, prompts, seeds, [zero]), clean)


def test_a_negative_prompt_goes_with_its_item(scenes, pipelines):
    plain = {"sample_id": 0, "text": "a red two"}
    for source in (scenes, pipelines("sd")[0]):
        away = draw(source, [{**plain, "negative_prompt": "b c"}], [0])
        assert not torch.equal(away, draw(source, [plain], [0]))


# ---- words


@pytest.mark.parametrize("which", ["miniature", "sd"])
def test_words_alone_are_steered(which, tmp_path):
    if which == "sd":
        save_pipeline("sd", tmp_path)
    point = "text_encoder.transformer.resblocks.0" if which == "miniature" else "text_encoder.encoder.layers.0"
    source = Diffusion(tmp_path if which == "sd" else "miniature:diffusion", [point], steps=2, device="cpu")
    words = "a red two" if which == "miniature" else "a b c"
    batch = source.collate([{"sample_id": 0, "text": words}])
    core = core_of(source.spec.d_in)
    seen = []

    class Spy(Content):
        def __call__(self, context):
            seen.append(super().__call__(context))
            return seen[-1]

    with steer(source, core, point, Add(0, 3.0), Spy(source.special_ids)):
        source.forward(batch)
    counts = torch.cat([mask.sum(1) for mask in seen])
    assert sorted(counts.tolist()) == [0, 3]  # the empty prompt of the other half, and three words
    row = next(row for mask in seen for row in mask if row.any())
    assert row.nonzero()[:, 0].tolist() == [1, 2, 3]


# ---- T14


def test_an_added_area_is_inside_the_block_and_everywhere_in_the_picture(tmp_path):
    """SDXL: outside of the map the block writes what it did, yet the picture changes all over; one step alone."""
    save_pipeline("sdxl", tmp_path, deep=False)
    point = POINTS["sdxl"]
    source = Diffusion(tmp_path, [point], steps=3, device="cpu")
    batch, core = source.collate(items_for("sdxl")), core_of(source.spec.d_in)
    clean = source.forward(batch)
    written = []

    def runs(where):
        with capture(source.model, [point], stop=False) as found, steer(source, core, point, Add(2, 60.0), where):
            drawn = source.forward(batch)
        return drawn, found[point]  # of the first step

    with capture(source.model, [point], stop=False) as found:
        source.forward(batch)
    before = found[point]
    drawn, after = runs(Mask(torch.eye(4)))
    changed = (after - before).abs().sum(1)
    side = changed.shape[-1]
    weights = torch.nn.functional.interpolate(torch.eye(4)[None, None], size=side, mode="bilinear")[0, 0]
    assert (changed[:, weights == 0] == 0).all()
    assert (changed[:, weights > 0.5] > 0.1).all()
    assert ((drawn - clean).abs().amax(1) > 0).float().mean() > 0.9
    late, untouched = runs(Steps(2, 2))
    assert torch.equal(untouched, before)
    assert not torch.equal(late, clean)
    assert written == []


# ---- transplants


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dit"])
def test_a_transplant_puts_the_codes_of_the_other_drawing_there(pipelines, kind):
    source, width = pipelines(kind)
    core, point = core_of(width), POINTS[kind]
    first, second = items_for(kind)
    edit, plain = (trace(source, core, point, [item], [5]) for item in (second, first))
    assert edit.codes.shape[0] == 3
    assert torch.equal(plain.pictures, draw(source, [first], [5]))
    whole = Transplant(edit, plain, n=M)
    z = []

    class Spy(Transplant):
        def change(self, codes, unit, rows):
            new = super().change(codes, unit, rows)
            z.append(new.reshape(rows.context.shape[0], -1, new.shape[-1]))
            return new

    spy = Spy(edit, plain, n=M)
    draw(source, [first], [5], [Intervention(core, point, [spy])])
    theirs = edit.codes[0][0][..., spy.latents].flatten(0, 1).float()
    got = z[0][-1][-len(theirs) :]
    assert_close(got, theirs, atol=2e-3, rtol=1e-3)  # kept in half precision
    nothing = Intervention(core, point, [Transplant(edit, plain, M, strength=0)])
    assert torch.equal(draw(source, [first], [5], [nothing]), plain.pictures)
    assert_close(whole.score, transport_scores(edit, plain, None, None))
    assert (whole.score[whole.on] > 0).all()
    assert (whole.score[whole.off] < 0).all()


def test_transplants_act_inside_masks_and_move_what_they_take(scenes):
    core = core_of(128)
    edit = trace(scenes, core, SCENE, [{"sample_id": 0, "text": "a green two at the top right"}], [1])
    plain = trace(scenes, core, SCENE, [{"sample_id": 0, "text": "a red one at the bottom left"}], [1])
    there, here = torch.zeros(32, 32), torch.zeros(32, 32)
    there[:16, 16:], here[16:, :16] = 1, 1
    z = edit.codes.float().mean((0, 1))
    own, source = z[:4, 4:].mean((0, 1)), plain.codes.float().mean((0, 1))[4:, :4].mean((0, 1))
    one = Transplant(edit, plain, 5, there, here)
    assert_close(one.score, own - source, atol=1e-4, rtol=1e-4)
    assert_close(one.codes[0, 0, 4:, :4], edit.codes[0, 0, :4, 4:][..., one.latents].float(), atol=1e-3, rtol=1e-3)
    with pytest.raises(MmsaeError, match="nothing to transplant"):
        Transplant(plain, plain, 5)
    many = [
        trace(scenes, core, SCENE, [{"sample_id": i, "text": text} for i in range(4)], range(4))
        for text in ("a two", "a one")
    ]
    with pytest.raises(MmsaeError, match="one batch"):
        draw(scenes, ["a red one"] * 3, [1, 2, 3], [Intervention(core, SCENE, [Transplant(*many)])])


def test_maps_are_stretched():
    ramp = torch.arange(8.0).view(1, 1, 1, 8, 1).expand(1, 1, 8, 8, 1)
    moved = _moved(ramp, (0, 0, 1, 0.5), (0, 0, 1, 1))
    assert_close(moved[0, 0, 0, :, 0], torch.tensor([0.0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.25]))


def test_a_dictionary_that_reads_the_timestep_steers(scenes):
    """What a code writes is that of the running timestep."""
    core = core_of(128, Temporal)
    torch.manual_seed(1)
    torch.nn.init.normal_(core.network[2].weight, std=0.05)
    with capture(scenes.model, [SCENE], stop=False) as found:
        scenes.forward(scenes.collate([{"sample_id": 0, "text": "a red two"}]))
    before = found[SCENE]
    with capture(scenes.model, [SCENE], stop=False) as found, steer(scenes, core, SCENE, Add(4, 2.0)):
        scenes.forward(scenes.collate([{"sample_id": 0, "text": "a red two"}]))
    change = (found[SCENE] - before).permute(0, 2, 3, 1).flatten(0, 2)
    first = float(scenes.pipe.scheduler.timesteps[0])
    assert_close(change, (2.0 * core.rows_at(first)[4]).expand_as(change), atol=1e-3, rtol=1e-3)
    assert not torch.allclose(core.rows_at(first)[4], core.rows_at(100)[4], atol=1e-2)


# ---- effects


def test_consistency_tells_one_direction_from_many():
    g = torch.Generator().manual_seed(0)
    before = torch.nn.functional.normalize(torch.randn(10, 64, generator=g), dim=-1)
    one = before + 0.5 * torch.nn.functional.normalize(torch.randn(64, generator=g), dim=0)
    many = before + 0.5 * torch.nn.functional.normalize(torch.randn(10, 64, generator=g), dim=-1)
    assert effect_of(before, one).consistency == pytest.approx(1, abs=1e-5)
    assert abs(effect_of(before, many).consistency) < 0.1
    still = effect_of(before, before)
    assert still.consistency == 0
    assert still.size == pytest.approx(0, abs=1e-6)


def test_candidates_are_those_of_a_band(scenes):
    rng = np.random.default_rng(0)
    counts = [1, 30, 200, 900, 0]
    rows = [np.sort(rng.choice(1000, n, replace=False)) for n in counts]
    values = np.concatenate([rng.random(n) + 0.5 for n in counts])
    latents = LatentStore(np.cumsum([0, *counts]), np.concatenate(rows), values, {}, 1000)
    assert sorted(in_band(latents, 0.01, 0.5).tolist()) == [1, 2]
    with pytest.raises(MmsaeError, match=r"no latent fires in 0\.95 to 1"):
        in_band(latents, 0.95, 1.0)


@pytest.fixture(scope="module")
def judge():
    return PictureJudge.load(device="cpu")


@pytest.mark.slow
def test_a_word_that_is_planted_is_found_and_named(judge):
    """A dictionary one row of which is the word blue less the other colours, among rows that are random."""
    point = "text_encoder.transformer.resblocks.0"
    source = Diffusion("miniature:diffusion", [point], steps=6, device="cpu", drop_special=True)
    colours = ("red", "green", "blue", "white", "yellow", "magenta")
    rows = source.read(source.collate([{"sample_id": i, "text": f"a {c} two"} for i, c in enumerate(colours)]))
    x = rows["acts"][point]
    word = torch.stack([x[rows["sample_id"] == i][1] for i in range(6)])
    planted = word[2] - word[[0, 1, 3, 4, 5]].mean(0)
    core = core_of(x.shape[1])
    with torch.no_grad():
        core.W_dec[3] = planted / planted.norm()
    items = [{"sample_id": i, "text": t} for i, t in enumerate(("a red two at the left", "a green four at the top"))]
    scale = torch.full((M,), 2 * float(planted.norm()))
    stage = Stage(source, core, point, scale, items, [10], Content.of(source))
    words = judge.prompts["colour"]
    found = discover(stage, judge, [1, 3, 5], words, "a digit", n_random=6, strength=1.0)
    best = max(found.effects, key=lambda effect: effect.size)
    assert best.latents == (3,)
    assert best.description[0][0] == "a blue digit"
    assert by_effect(stage, judge, [5, 3, 1], "a blue digit", "a digit", 1.0)[0].latents == (3,)


# ---- the judge


def test_the_judge_sees_scenes(judge):
    scenes = DrawnScenes("test", 40, seed=0)
    pixels = torch.stack([torch.as_tensor(scenes.pixels(i)) for i in range(40)]).permute(0, 3, 1, 2) / 255
    seen = judge.factors(pixels)
    for factor, truth in scenes.labels.items():
        assert (seen[factor] == truth).mean() > 0.85, factor
    captions = [scenes.caption(i) for i in range(40)]
    own, other = judge.clip_score(pixels, captions), judge.clip_score(pixels, captions[1:] + captions[:1])
    assert own.mean() > other.mean() + 5
    red, blue = (judge.texts([f"a {c} digit"]) for c in ("red", "blue"))
    assert_close(judge.directional(red, blue, "a blue digit", "a red digit"), torch.ones(1), atol=1e-5, rtol=0)
    named = describe(effect_of(red, blue), judge, judge.prompts["colour"], "a red digit")
    assert named.description[0][0] == "a blue digit"


def test_a_box_leaves_the_rest_of_the_block_alone(scenes):
    core = core_of(128)
    with capture(scenes.model, [SCENE], stop=False) as found:
        scenes.forward(scenes.collate([{"sample_id": 0, "text": "a red two"}]))
    before = found[SCENE]
    where = Box(0, 0, 0.5, 1) & Steps(0, 0)
    with capture(scenes.model, [SCENE], stop=False) as found, steer(scenes, core, SCENE, Add(1, 9.0), where):
        scenes.forward(scenes.collate([{"sample_id": 0, "text": "a red two"}]))
    change = (found[SCENE] - before).abs().sum(1)
    assert (change[:, 4:] == 0).all()
    assert (change[:, :4] > 1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_with_a_mask_the_prediction_outside_is_that_of_the_unsteered_model(pipelines, kind):
    source, width = pipelines(kind)
    items, core = items_for(kind), core_of(width)
    edit = Intervention(core, POINTS[kind], [Add(1, 40.0)])
    clean, pushed = draw(source, items, [3, 4]), draw(source, items, [3, 4], [edit])
    assert_close(draw(source, items, [3, 4], [edit], inside=torch.zeros(8, 8)), clean, atol=1e-5, rtol=1e-4)
    assert_close(draw(source, items, [3, 4], [edit], inside=torch.ones(8, 8)), pushed, atol=1e-5, rtol=1e-4)
    assert torch.equal(draw(source, items, [3, 4]), clean)


def test_pixels_outside_of_the_mask_stay(scenes):
    """The miniature has no decoder that would spread what is inside."""
    prompts, seeds = ["a red two at the top", "a blue one at the left"], [0, 1]
    half = torch.zeros(32, 32)
    half[:, :16] = 1
    edit = Intervention(core_of(128), SCENE, [Add(0, 60.0)], Mask(half))
    clean = draw(scenes, prompts, seeds)
    changed = (draw(scenes, prompts, seeds, [edit], inside=half) - clean).abs().mean((0, 1))
    assert changed[:, 16:].max() < 1e-5
    assert changed[:, :16].mean() > 0.01
    leaking = (draw(scenes, prompts, seeds, [edit]) - clean).abs().mean((0, 1))
    assert leaking[:, 16:].mean() > 0.1 * leaking[:, :16].mean()
