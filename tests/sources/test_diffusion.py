import numpy as np
import pytest
import torch
from PIL import Image
from tiny_diffusion import KINDS, POINTS, SIDES, items_for, save_pipeline
from torch.testing import assert_close

from mmsae.errors import MmsaeError
from mmsae.hooks import edit
from mmsae.sources import Diffusion
from mmsae.spec import ACTS

pytest.importorskip("diffusers")

STEPS = 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            save_pipeline(kind, made[kind])
        return made[kind]

    return folder


def source_of(folders, kind, points=None, **arguments):
    given = {"steps": STEPS, "device": "cpu"} | arguments
    if kind == "flux" and "size" not in given:
        given["size"] = 16  # its own is 1024 pixels
    return Diffusion(folders(kind), [points or POINTS[kind]], **given)


def by_hand(source, batch):
    """What the block of a hook point `:delta` writes at each call, by plain hooks of torch."""
    path, _, index = source.hook_points[0].partition(":delta")
    module, found = source.model.get_submodule(path), []

    def after(module, args, kwargs, output):
        start = args[0] if args else kwargs["hidden_states"]
        out = output[int(index[1:-1])] if index else output[0] if isinstance(output, tuple) else output
        found.append((out - start).detach())

    handle = module.register_forward_hook(after, with_kwargs=True)
    with torch.no_grad():
        source.forward(batch)
    handle.remove()
    return [x.flatten(2).mT if x.dim() == 4 else x for x in found]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_what_the_block_writes_at_every_step(folders, kind):
    source = source_of(folders, kind, guidance="both")
    batch = source.collate(items_for(kind))
    rows = source.read(batch)
    plain = by_hand(source, batch)
    assert len(plain) == STEPS
    halves = len(plain[0]) // 2
    assert halves == (1 if kind == "flux" else 2)  # a distilled model has no unconditional half
    acts = rows[ACTS][source.hook_points[0]]
    assert torch.equal(acts, torch.cat([x.flatten(0, 1) for x in plain]))
    assert acts.std() > 0
    assert source.spec.streams == {source.hook_points[0]: acts.shape[1]}

    patches = SIDES[kind] ** 2
    per_step = 2 * halves * patches
    assert len(acts) == STEPS * per_step
    times = source.pipe.scheduler.timesteps[:STEPS].round().long().tolist()
    assert rows["timestep"].tolist() == [t for t in times for _ in range(per_step)]
    assert times == sorted(times, reverse=True)
    assert (rows["sigma"].diff() <= 0).all()
    places = torch.stack([rows["row"], rows["column"]], dim=1)[:patches]
    assert places.tolist() == [[i, j] for i in range(SIDES[kind]) for j in range(SIDES[kind])]
    conditional, ids = rows["conditional"].view(STEPS, halves, 2, patches), rows["sample_id"]
    first = {"dit": [1, 0], "flux": [1]}.get(kind, [0, 1])
    assert all(conditional[:, i].eq(value).all() for i, value in enumerate(first))
    assert ids.tolist() == [i for _ in range(STEPS * halves) for i in range(2) for _ in range(patches)]


@pytest.mark.parametrize("kind", ["sd", "dit", "sd3"])
def test_only_the_half_that_knows_the_prompt_depends_on_it(folders, kind):
    source = source_of(folders, kind, guidance="both", timesteps=[1000])
    items = items_for(kind)
    swapped = [{**items[1], "sample_id": 0}, {**items[0], "sample_id": 1}]
    if kind == "sd3":
        for item, other in zip(swapped, items, strict=True):
            item |= {key: value for key, value in other.items() if key.startswith("negative")}
    batches = [source.collate(x) for x in (items, swapped)]
    batches[1]["noise_seed"] = batches[0]["noise_seed"]
    first, second = (source.read(batch) for batch in batches)
    a, b = (x[ACTS][source.hook_points[0]] for x in (first, second))
    known = first["conditional"] == 1
    assert torch.allclose(a[~known], b[~known], atol=1e-6)
    assert not torch.allclose(a[known], b[known], atol=1e-6)
    alone = source_of(folders, kind, timesteps=[1000]).read(source.collate(items))
    assert torch.equal(alone[ACTS][source.hook_points[0]], a[known])
    assert alone["conditional"].eq(1).all()


def test_chosen_timesteps_are_the_nearest_steps_and_the_rest_is_not_run(folders):
    source = source_of(folders, "sd", steps=10, timesteps=[890, 512])
    batch = source.collate(items_for("sd"))
    all_steps = source_of(folders, "sd", steps=10).read(batch)
    calls = []
    handle = source.denoiser.register_forward_pre_hook(lambda *_: calls.append(1))
    rows = source.read(batch)
    handle.remove()
    times = source.pipe.scheduler.timesteps.tolist()
    assert rows["timestep"].unique().tolist() == [501, 901]  # DDIM of Stable Diffusion: 901, 801, ...
    assert len(calls) == times.index(501) + 1
    kept = torch.isin(all_steps["timestep"], torch.tensor([501, 901]))
    point = source.hook_points[0]
    assert torch.equal(rows[ACTS][point], all_steps[ACTS][point][kept])


def test_an_item_gives_the_same_rows_in_any_batch(folders):
    source = source_of(folders, "sd")
    items = items_for("sd", 3)
    together, alone = source.read(source.collate(items)), source.read(source.collate(items[1:2]))
    point = source.hook_points[0]
    assert torch.allclose(together[ACTS][point][together["sample_id"] == 1], alone[ACTS][point], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_edits_change_the_output(folders, kind):
    source = source_of(folders, kind)
    batch = source.collate(items_for(kind))
    with torch.no_grad():
        plain = source.forward(batch)
        with edit(source.model, {source.hook_points[0]: lambda x: x}):
            same = source.forward(batch)
        with edit(source.model, {source.hook_points[0]: lambda x: -3 * x}):
            changed = source.forward(batch)
    assert torch.allclose(plain, same, atol=1e-4, rtol=1e-3)
    assert (plain - changed).abs().max() > 1e-3 * plain.abs().max()


def test_a_splice_replaces_the_rows_that_are_read(folders):
    source = source_of(folders, "sd", timesteps=[700])
    batch = source.collate(items_for("sd"))
    rows, plain, _ = source.run(batch)
    given = []

    def change(x):
        given.append(x.clone())
        return x + 1

    with torch.no_grad(), source.spliced(batch, {source.hook_points[0]: change}):
        changed = source.forward(batch)
    assert len(given) == 1  # of one step, the half with the prompt
    assert torch.allclose(given[0], rows[ACTS][source.hook_points[0]], atol=1e-5)
    assert source.divergence(changed, plain, batch) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_noised_pictures_are_read_at_each_timestep(folders, kind):
    size = 64 if kind == "pixart" else 16
    source = source_of(folders, kind, mode="noise", timesteps=[900, 100], size=size)
    pictures = [Image.effect_noise((20, 20), 50).convert("RGB") for _ in range(2)]
    items = [{**item, "image": image} for item, image in zip(items_for(kind), pictures, strict=True)]
    batch = source.collate(items)
    rows, output, _ = source.run(batch)
    acts = rows[ACTS][source.hook_points[0]]
    plain = by_hand(source, batch)
    assert torch.allclose(acts, torch.cat([x.flatten(0, 1) for x in plain]), atol=1e-5)
    assert rows["timestep"].unique().tolist() == [100, 900]
    assert rows["conditional"].eq(1).all()
    assert rows["sigma"][0] > rows["sigma"][-1]
    assert output["predicted"].shape == output["target"].shape
    error = source.outcomes(output, batch)["denoising_error"]
    assert error.shape == (2,)
    assert torch.isclose(2 * error.sum(), source.loss(output, batch))


def test_the_noise_is_that_of_the_scheduler(folders):
    source = source_of(folders, "sd", mode="noise", timesteps=[300], size=16)
    item = {"sample_id": 7, "image": Image.new("RGB", (16, 16), (200, 30, 60)), "text": "a"}
    batch = source.collate([item])
    given = []
    handle = source.denoiser.register_forward_pre_hook(lambda module, args: given.append(args))
    with torch.no_grad():
        output = source.forward(batch)
    handle.remove()
    clean, noise = source._latents(batch["pixels"]), output["target"][0]
    expected = source.pipe.scheduler.add_noise(clean, noise, torch.tensor([300]))
    assert torch.allclose(given[-1][0], expected, atol=1e-5)
    assert given[-1][1].tolist() == [300]
    kept = source.pipe.scheduler.alphas_cumprod[300]
    assert torch.isclose(source.read(batch)["sigma"][0], ((1 - kept) / kept).sqrt(), rtol=1e-4)


def test_random_timesteps_belong_to_the_picture(folders):
    source = source_of(folders, "sd", mode="noise", draws=3, size=16)
    items = [{"sample_id": i, "image": Image.new("RGB", (16, 16))} for i in range(4)]
    rows, alone = source.read(source.collate(items)), source.read(source.collate(items[2:3]))
    assert rows["timestep"][rows["sample_id"] == 2].unique().tolist() == alone["timestep"].unique().tolist()
    assert len(rows["timestep"].unique()) > 3


def test_gradients_of_noised_pictures(folders):
    source = source_of(folders, "sd", mode="noise", timesteps=[800, 200], size=16)
    batch = source.collate([{"sample_id": 0, "image": Image.new("RGB", (16, 16), (9, 99, 199)), "text": "a"}])
    rows = source.read(batch, gradients=True)
    point = source.hook_points[0]
    assert rows["grads"][point].shape == rows[ACTS][point].shape
    assert rows["timestep"].tolist() == [800] * 16 + [200] * 16
    assert torch.allclose(rows[ACTS][point], source.read(batch)[ACTS][point], atol=1e-5)
    # against a finite difference, at the first timestep
    direction = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    first = source_of(folders, "sd", mode="noise", timesteps=[800], size=16)
    losses = []
    for eps in (-1e-2, 1e-2):
        with torch.no_grad(), first.spliced(batch, {point: lambda x, eps=eps: x + eps * direction}):
            losses.append(first.loss(first.forward(batch), batch))
    slope = (losses[1] - losses[0]) / 2e-2
    assert torch.isclose(slope, (rows["grads"][point][:16] * direction).sum(), rtol=0.05)


def test_words_of_the_text_encoder(folders):
    source = source_of(folders, "sd", "text_encoder.encoder.layers.0")
    rows = source.read(source.collate(items_for("sd")))
    assert rows["position"].tolist() == [*range(4), *range(5)]  # padding is no row
    assert rows["kind"].tolist() == [1, 0, 0, 2, 1, 0, 0, 0, 2]
    assert rows["timestep"].eq(-1).all()
    assert rows["conditional"].eq(1).all()
    ids = source.pipe.tokenizer(["a b"])["input_ids"]
    with torch.no_grad():
        states = source.pipe.text_encoder(torch.tensor(ids), output_hidden_states=True).hidden_states
    assert torch.allclose(rows[ACTS][source.hook_points[0]][:4], states[1][0], atol=1e-5)
    shown = source.render(items_for("sd")[0])
    assert shown["kind"] == "text"
    assert len(shown["tokens"]) == 4


def test_words_of_a_joint_block_have_no_place(folders):
    source = source_of(folders, "sd3", "transformer.transformer_blocks.0:output[0]")
    rows = source.read(source.collate(items_for("sd3")))
    assert rows["row"].eq(-1).all()
    assert rows["position"].unique().tolist() == list(range(6))


def test_rendering_shows_what_the_prompt_gives(folders):
    source = source_of(folders, "sd")
    item = items_for("sd")[0]
    shown = source.render(item)
    assert shown["kind"] == "diffusion"
    assert shown["text"] == "a b"
    assert shown["image"].size == (16, 16)
    assert np.array_equal(np.array(shown["image"]), np.array(source.render(item)["image"]))
    assert source_of(folders, "sd", pictures=False).render(item)["image"] is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"mode": "draw"}, "mode='draw' is unknown; choose generate or noise"),
        ({"guidance": "none"}, "guidance='none' is unknown"),
        ({"timesteps": []}, "reads nothing"),
        ({"steps": 0}, "steps=0 is out of range"),
    ],
)
def test_wrong_arguments_are_told_before_anything_is_loaded(arguments, said):
    with pytest.raises(MmsaeError, match=said):
        Diffusion("nowhere", ["unet.mid_block"], **arguments)


def test_what_cannot_be_loaded_is_named(tmp_path, folders):
    with pytest.raises(MmsaeError, match=r"no pipeline of diffusers: it has no model_index\.json"):
        _ = Diffusion(tmp_path, ["unet.mid_block"]).model
    with pytest.raises(MmsaeError, match=r"different positions; extract them separately"):
        Diffusion(tmp_path, ["unet.mid_block", "text_encoder.encoder.layers.0"])
    source = source_of(folders, "sd", mode="noise", timesteps=[5000], size=16)
    batch = source.collate([{"sample_id": 0, "image": Image.new("RGB", (16, 16))}])
    with pytest.raises(MmsaeError, match=r"timesteps=5000 is too high"):
        source.read(batch)
    with pytest.raises(MmsaeError, match=r"item 3 has no text"):
        source_of(folders, "sd").collate([{"sample_id": 3, "text": " "}])
    with pytest.raises(MmsaeError, match=r"item 4 has no 'class_label'"):
        source_of(folders, "dit").collate([{"sample_id": 4, "text": "unicorn"}])
    assert source_of(folders, "dit").collate([{"sample_id": 4, "text": "hound"}])["class_label"].tolist() == [1]


def test_two_threads_read_at_once():
    """A chunk is read ahead while validation reads too."""
    from concurrent.futures import ThreadPoolExecutor

    source = Diffusion("miniature:diffusion", ["unet.mid_block.attentions.0:delta"], steps=3, device="cpu")
    items = [{"text": "a red two", "sample_id": i} for i in range(2)]
    want = source.read(source.collate(items))
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: source.read(source.collate(items)), range(4)))
    for rows in found:
        assert torch.equal(rows["timestep"], want["timestep"])
        assert_close(rows["acts"], want["acts"])
