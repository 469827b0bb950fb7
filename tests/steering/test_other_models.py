"""Steering images, sounds, signals, multimodal and diffusion models: layouts, masks, halves of guidance, steps."""

import pytest
import torch
from PIL import Image
from tiny_diffusion import KINDS, POINTS, SIDES, items_for, save_pipeline
from tiny_lmm import SIDE, save_lmm
from torch.testing import assert_close

from mmsae.cores import TopK
from mmsae.errors import MmsaeError
from mmsae.hooks import capture
from mmsae.sources import Diffusion, Signal, Source, Timm, VisionLanguage
from mmsae.steering import (
    Add,
    Box,
    Conditional,
    Examples,
    Generated,
    ImageTokens,
    Mask,
    Reconstruct,
    Replace,
    Steps,
    Timesteps,
    steer,
)


def core_of(width, seed=0, m=32):
    torch.manual_seed(seed)
    return TopK(width, m, k=4).eval().requires_grad_(False)


def moved(model, hook_point, run, core, edits, where=None, **arguments):
    """What an intervention changes at its own hook point, and what the model gives with and without it."""
    module = model.model if isinstance(model, Source) else model
    with capture(module, [hook_point], stop=False) as clean:
        before = run()
    with steer(model, core, hook_point, edits, where, **arguments), capture(module, [hook_point], stop=False) as found:
        after = run()
    name = next(iter(clean))
    return (found[name] - clean[name]).float(), before, after


# ---- pictures

VISION = [
    ("vit_tiny_patch16_224", {"img_size": 64, "depth": 2, "num_classes": 5}, "blocks.0", 192),
    ("vit_small_patch14_reg4_dinov2", {"img_size": 56, "depth": 2, "num_classes": 5}, "blocks.0", 384),
    ("resnet18", {"num_classes": 5}, "layer2", 128),
    ("convnext_atto", {"num_classes": 5}, "stages.1", 80),
    ("swin_tiny_patch4_window7_224", {"num_classes": 5, "depths": (1, 1, 1, 1)}, "layers.0", 96),
]


@pytest.mark.parametrize(("name", "given", "point", "width"), VISION, ids=[v[0] for v in VISION])
def test_pictures_are_steered_inside_a_box(name, given, point, width):
    pytest.importorskip("timm")
    source = Timm(name, [point], pretrained=False, device="cpu", config=given)
    side = given.get("img_size", 224 if "swin" in name else 64)
    x = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    core = core_of(width)
    box = Box(0, 0, 0.5, 1.0)
    with torch.no_grad():
        # the source knows that the maps of a Swin have their channels last
        change, before, after = moved(source, point, lambda: source.model(x), core, Add(1, 5.0), box)
    if source.channels_last:
        change = change.movedim(-1, 1)
    assert not torch.equal(before, after)
    strength = change.norm(dim=1 if change.dim() == 4 else -1)
    if change.dim() == 4:
        rows = strength.shape[1]
        assert_close(strength[:, : rows // 2], torch.full_like(strength[:, : rows // 2], 5.0), atol=1e-3, rtol=1e-3)
        assert (strength[:, rows // 2 :] == 0).all()
    else:
        side = int((strength.shape[1]) ** 0.5)
        patches = strength[:, -side * side :].view(2, side, side)
        assert_close(patches[:, : side // 2], torch.full_like(patches[:, : side // 2], 5.0), atol=1e-3, rtol=1e-3)
        assert (patches[:, side // 2 :] == 0).all()
        assert (strength[:, : -side * side] == 0).all(), "class and register tokens have no place in a picture"


def test_a_mask_of_any_size_lies_over_the_patches():
    pytest.importorskip("timm")
    source = Timm("resnet18", ["layer2"], pretrained=False, device="cpu")
    x = torch.rand(1, 3, 64, 64)
    mask = torch.zeros(32, 32)
    mask[:16, 16:] = 1
    with torch.no_grad():
        change, *_ = moved(source.model, "layer2", lambda: source.model(x), core_of(128), Add(1, 5.0), Mask(mask))
    strength = change.norm(dim=1)[0]  # 8x8
    assert_close(strength[:4, 4:], torch.full((4, 4), 5.0), atol=1e-3, rtol=1e-3)
    assert (strength[4:] == 0).all()
    assert (strength[:, :4] == 0).all()
    half, *_ = moved(
        source.model, "layer2", lambda: source.model(x), core_of(128), Add(1, 5.0), Mask(torch.full((5, 7), 0.5))
    )
    assert_close(half.norm(dim=1)[0], torch.full((8, 8), 2.5), atol=1e-3, rtol=1e-3)


def test_masks_from_files(tmp_path):
    Image.new("L", (8, 8), 255).save(tmp_path / "white.png")
    assert Mask(str(tmp_path / "white.png")).weights.min() == 1
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(MmsaeError, match="is no picture that can be a mask"):
        Mask(str(tmp_path / "broken.png"))


def test_positions_without_a_square_ask_for_the_grid():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    x = torch.randn(1, 12, 8)
    with pytest.raises(MmsaeError, match="12 positions are no square of patches; give the grid"):  # noqa: SIM117
        with steer(model, core_of(8), "0", Add(0), Box(0, 0, 0.5, 1)):
            model(x)
    with torch.no_grad():
        change, *_ = moved(model, "0", lambda: model(x), core_of(8), Add(0), Box(0, 0, 0.5, 1, grid=(2, 6)))
    assert (change[0].norm(dim=-1) > 0).tolist() == [True] * 6 + [False] * 6


def test_the_towers_of_the_miniature_clip():
    pytest.importorskip("open_clip")
    from mmsae.sources import SceneCLIP

    source = SceneCLIP(["visual.transformer.resblocks.2"])
    images = torch.rand(2, 3, 64, 64)
    model = source.model
    with torch.no_grad():
        clean = model.encode_image(images)
        width = model.visual.conv1.out_channels
        with steer(source, core_of(width), "visual.transformer.resblocks.2", Add(1, 8.0)):
            steered = model.encode_image(images)
        with steer(source, core_of(width), "visual.transformer.resblocks.2", Add(1, 8.0), Examples([1])):
            second = model.encode_image(images)
    assert not torch.allclose(clean, steered, atol=1e-3)
    assert torch.equal(second[0], clean[0])
    assert_close(second[1], steered[1])


# ---- signals and sounds


def test_an_ecg_encoder():
    source = Signal("miniature:ecg_jepa", ["blocks.0"], device="cpu")
    items = source.example_items()
    batch = source.collate(items)
    core = core_of(source.spec.d_in)
    change, before, after = moved(source.model, "blocks.0", lambda: source.forward(batch), core, Add(2, 3.0))
    assert_close(change.norm(dim=-1), torch.full_like(change[..., 0], 3.0), atol=1e-3, rtol=1e-3)
    assert not torch.equal(before, after)


# ---- multimodal models


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    pytest.importorskip("transformers")
    folder = save_lmm(tmp_path_factory.mktemp("llava"), "llava")
    source = VisionLanguage(str(folder), ["model.language_model.layers.0"], device="cpu")
    source.model.config.vision_feature_layer = -2  # as in the released ones
    image = Image.effect_noise((SIDE, SIDE), 80).convert("RGB")
    content = [{"type": "image"}, {"type": "text", "text": "what colour is the cat ?"}]
    item = {"image": image, "messages": [{"role": "user", "content": content}], "sample_id": 0}
    return source, source.collate([item])


def test_layers_whose_states_are_recorded_are_steered_after_a_first_call(llava):
    source, batch = llava
    clean = source.forward(batch).logits  # transformers has its own hooks from now on
    point = "model.vision_tower.encoder.layers.0"
    with steer(source, core_of(24), point, Add(1, 20.0)):
        steered = source.forward(batch).logits
    assert (clean - steered).abs().max() > 1e-4
    assert torch.equal(source.forward(batch).logits, clean)


def test_a_layer_that_nothing_reads_is_named(llava):
    source, _ = llava
    point = "model.vision_tower.encoder.layers.1"  # LLaVA reads the layer before the last
    with (
        pytest.warns(UserWarning, match="reads layer 0 .* nothing will change"),
        steer(source, core_of(24), point, Add(1)),
    ):
        source.forward(llava[1])


def test_image_tokens_and_words_apart_and_a_box_on_the_picture(llava):
    source, batch = llava
    point = "model.language_model.layers.0"
    patches = batch["input_ids"][0] == source.image_id
    core = core_of(32)
    with torch.no_grad():
        for where, expected in (
            (ImageTokens(), patches),
            (~ImageTokens(), ~patches),
            (Box(0, 0, 0.5, 1), patches & (patches.cumsum(0) <= patches.sum() // 2)),
        ):
            change, *_ = moved(source.model, point, lambda: source.forward(batch), core, Add(1, 4.0), where)
            assert torch.equal(change[0].norm(dim=-1) > 0, expected)


def test_what_a_multimodal_model_generates_is_steered(llava):
    source, batch = llava
    given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], **batch["inputs"]}
    given = {k: v for k, v in given.items() if isinstance(v, torch.Tensor)}
    lengths = []

    def where(context):
        weight = Generated()(context)
        lengths.append(int(weight.sum()))
        return weight

    with steer(source, core_of(32), "model.language_model.layers.0", Add(1, 4.0), where):
        source.model.generate(**given, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert lengths == [0, 1, 1, 1]


# ---- diffusion


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    pytest.importorskip("diffusers")
    made = {}

    def get(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            save_pipeline(kind, folder)
            size = {"size": 16} if kind == "flux" else {}
            source = Diffusion(folder, [POINTS[kind]], steps=3, device="cpu", **size)
            made[kind] = source, source.collate(items_for(kind)), source.spec.d_in
        return made[kind]

    return get


GUIDED = {"sd": 7.5, "sdxl": 5.0, "dit": 4.0, "pixart": 4.5, "sd3": 7.0, "flux": None}


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_that_changes_nothing_leaves_the_drawing_as_it_is(pipelines, kind):
    source, batch, width = pipelines(kind)
    clean = source.forward(batch)
    core = core_of(width)
    with steer(source, core, POINTS[kind], [Add(0, 0.0), Reconstruct()]):
        assert_close(source.forward(batch), clean, atol=1e-5, rtol=1e-4)
    with steer(source, core, POINTS[kind], Add(0, 30.0)):
        assert not torch.allclose(source.forward(batch), clean, atol=1e-3)
    assert torch.equal(source.forward(batch), clean)


@pytest.mark.parametrize("kind", KINDS)
def test_strength_zero_at_the_output_of_a_block_changes_no_bit(pipelines, kind):
    source, batch, width = pipelines(kind)
    point = POINTS[kind].replace(":delta", ":output" if "[" in POINTS[kind] else "")
    clean = source.forward(batch)
    with steer(source, core_of(width), point, Add(0, 0.0)):
        assert torch.equal(source.forward(batch), clean)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_and_timesteps_pick_the_same_calls(pipelines, kind):
    source, batch, width = pipelines(kind)
    seen = []

    def where(context):
        seen.append((context.step, float(context.time[0])))
        return Steps(1, 1)(context)

    with steer(source, core_of(width), POINTS[kind], Add(0, 30.0), where):
        by_step = source.forward(batch)
    assert [step for step, _ in seen] == [0, 1, 2]
    middle = seen[1][1]
    with steer(source, core_of(width), POINTS[kind], Add(0, 30.0), Timesteps(middle - 0.1, middle + 0.1)):
        by_time = source.forward(batch)
    assert torch.equal(by_step, by_time)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "flux"])
def test_the_half_that_knows_the_prompt(pipelines, kind):
    source, batch, width = pipelines(kind)
    n, counts = 2, []
    first = kind == "dit"

    def where(context):
        counts.append(context.conditional.tolist())
        return Conditional()(context)

    old, source.guidance_scale = source.guidance_scale, GUIDED[kind]
    try:
        with steer(source, core_of(width), POINTS[kind], Add(0, 1.0), where):
            source.forward(batch)
        both, *_ = moved(
            source.model, POINTS[kind], lambda: source.forward(batch), core_of(width), Add(0, 1.0), Conditional()
        )
        pushed, *_ = moved(
            source.model, POINTS[kind], lambda: source.forward(batch), core_of(width), Add(0, 1.0),
            Conditional(opposed=True),
        )  # fmt: skip
    finally:
        source.guidance_scale = old
    assert counts[0] == [first] * n + [not first] * n
    assert len(both) == 2 * n
    knows = slice(0, n) if first else slice(n, 2 * n)
    other = slice(n, 2 * n) if first else slice(0, n)
    assert both[knows].abs().sum() > 0.1
    assert both[other].abs().sum() == 0
    assert_close(pushed[knows], both[knows], atol=1e-4, rtol=1e-3)
    assert_close(pushed[other].abs().sum(), both[knows].abs().sum(), atol=0.1, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_box_acts_on_its_patches_only(pipelines, kind):
    source, batch, width = pipelines(kind)
    change, before, after = moved(
        source.model, POINTS[kind], lambda: source.forward(batch), core_of(width), Add(0, 9.0), Box(0, 0, 0.5, 1)
    )
    side = SIDES[kind]
    strength = change.norm(dim=1) if change.dim() == 4 else change.norm(dim=-1).unflatten(1, (side, side))
    assert (strength[:, side // 2 :] == 0).all()
    assert strength[:, : side // 2].min() > 1
    assert not torch.equal(before, after)


def test_a_block_can_be_skipped_and_a_pipeline_given_by_itself(pipelines):
    source, batch, _ = pipelines("sd")
    with steer(source.pipe, None, POINTS["sd"], Replace()):
        skipped = source.forward(batch)
    with capture(source.model, [POINTS["sd"]], stop=False) as found, steer(source.pipe, None, POINTS["sd"], Replace()):
        source.forward(batch)
    assert found[POINTS["sd"]].abs().max() == 0
    assert not torch.equal(skipped, source.forward(batch))


def test_words_in_the_text_encoder_of_a_pipeline(pipelines):
    source, batch, _ = pipelines("sd")
    clean = source.forward(batch)
    with steer(source.pipe, core_of(16), "text_encoder.encoder.layers.0", Add(1, 9.0)):
        assert not torch.allclose(source.forward(batch), clean, atol=1e-4)
    assert torch.equal(source.forward(batch), clean)


def test_steps_of_a_bare_network_are_not_known(pipelines):
    source, batch, width = pipelines("sd")
    with pytest.raises(MmsaeError, match="steps are known of a pipeline only"):  # noqa: SIM117
        with steer(source.pipe.unet, core_of(width), POINTS["sd"].removeprefix("unet."), Add(0), Steps(0, 1)):
            source.forward(batch)
