"""T15: the latents of a concept are found at every step, and removed as the formula says."""

import pytest
import torch
from tiny_diffusion import items_for, save_pipeline
from torch.testing import assert_close

from mmsae.cores import TopK
from mmsae.errors import MmsaeError
from mmsae.sources import Diffusion
from mmsae.spec import ACTS
from mmsae.steering import Ablate, ConceptMeans, Intervention, Timesteps, Unlearn, intervene, steer

D, M, TIMES, NAMES = 16, 40, (901, 601, 301, 101, 1), ("red", "green", "blue")


def core_of(width=D):
    """A dictionary whose latent `i` reads and writes the direction `i`, for `i < width`."""
    torch.manual_seed(0)
    core = TopK(width, M, k=6)
    with torch.no_grad():
        core.W_enc[:width] = torch.eye(width)
        core.W_dec[:width] = torch.eye(width)
        core.W_enc[width:] = 0.01 * core.W_enc[width:]
    return core.eval().requires_grad_(False)


def batches(planted):
    """Rows in which the latent `planted[concept][step]` is active for this concept at this step, and noise."""
    g = torch.Generator().manual_seed(1)
    for time in TIMES:
        x = 0.3 * torch.rand(90, D, generator=g)
        label = torch.arange(90) % 3
        for concept in range(3):
            x[label == concept, planted[concept][TIMES.index(time)]] += 2.0
        yield {ACTS: {"x": x}, "timestep": torch.full((90,), time), "label.colour": label}


PLANTED = [[0, 1, 2, 3, 4], [5, 5, 5, 6, 6], [7, 8, 7, 8, 7]]


@pytest.fixture(scope="module")
def means():
    return ConceptMeans.measure(core_of(), batches(PLANTED), "colour", NAMES)


def test_means_are_those_of_a_loop(means):
    core = core_of()
    for step, batch in enumerate(batches(PLANTED)):
        z = core.encode(batch[ACTS]["x"]).dense()
        for concept in range(3):
            assert_close(means.means[concept, step], z[batch["label.colour"] == concept].mean(0))


@pytest.mark.parametrize("concept", range(3))
def test_the_planted_latent_comes_first_at_every_timestep(means, concept):
    scores = means.scores(NAMES[concept])
    assert scores.argmax(1).tolist() == PLANTED[concept]
    rest = means.means[[c for c in range(3) if c != concept]].mean(0)
    own = means.means[concept]
    assert_close(scores, own / own.sum(-1, keepdim=True) - rest / rest.sum(-1, keepdim=True))
    chosen = means.selected(NAMES[concept], 98)  # of 40 scores one lies above
    assert chosen.sum(1).tolist() == [1] * 5
    assert chosen.int().argmax(1).tolist() == PLANTED[concept]


@pytest.mark.parametrize(("percentile", "n"), [(99.999, 1), (99.995, 2), (99.99, 3)])
def test_percentiles_of_the_paper_choose_as_many_as_there(percentile, n):
    g = torch.Generator().manual_seed(0)
    means = ConceptMeans(torch.rand(2, 3, 20_480, generator=g), torch.ones(2, 3), torch.tensor([9.0, 5, 1]), ("a", "b"))
    assert means.selected("a", percentile).sum(1).tolist() == [n] * 3


@pytest.fixture(scope="module")
def drawing(tmp_path_factory):
    pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("sd")
    save_pipeline("sd", folder)
    point = "unet.mid_block.attentions.0"
    source = Diffusion(folder, [point], steps=5, guidance_scale=7.5, device="cpu")
    core = TopK(source.spec.d_in, M, k=6).eval().requires_grad_(False)
    batch = source.collate(items_for("sd"))
    times = torch.tensor([801.0, 601, 401, 201, 1])
    g = torch.Generator().manual_seed(3)
    means = ConceptMeans(0.2 * torch.rand(3, 5, M, generator=g), torch.ones(3, 5), times, NAMES)
    return source, core, point, batch, means


def test_gamma_zero_is_ablation_of_what_is_unusually_active(drawing):
    source, core, point, batch, means = drawing
    edit = Unlearn(means, "red", percentile=90, gamma=0.0)
    with steer(source, core, point, edit):
        unlearnt = source.forward(batch)
    by_hand = []
    for step, time in enumerate(means.timesteps.tolist()):
        latents = means.selected("red", 90)[step].nonzero()[:, 0]
        assert len(latents) == 4

        class Unusual(Ablate):
            def change(self, z, unit, rows, step=step, latents=latents):
                usual = means.means.mean(0)[step, latents]
                return torch.where(z > usual, 0 * z, z)

        by_hand.append(Intervention(core, point, [Unusual(latents)], Timesteps(time - 1, time + 1)))
    with intervene(source, by_hand):
        assert torch.equal(source.forward(batch), unlearnt)
    assert not torch.equal(source.forward(batch), unlearnt)


def test_the_factor_is_gamma_times_the_mean(drawing):
    source, core, point, batch, means = drawing
    for relative in (False, True):
        edit = Unlearn(means, "green", percentile=90, gamma=-3.0, relative=relative)
        z = torch.full((1, len(edit.latents)), 5.0)
        seen = []

        class Spy(Unlearn):
            def change(self, z, unit, rows, seen=seen):
                seen.append((rows.context.step, super().change(torch.full_like(z, 5.0), unit, rows)[0]))
                return z

        spy = Spy(means, "green", percentile=90, gamma=-3.0, relative=relative)
        with steer(source, core, point, spy):
            source.forward(batch)
        for step, new in seen:
            chosen = means.selected("green", 90)[step][spy.latents]
            factor = torch.full_like(new, -3.0) if relative else -3.0 * means.means[1, step, spy.latents]
            assert_close(new, torch.where(chosen, factor * 5.0, z[0]))
        assert [step for step, _ in seen] == list(range(5))


def test_without_a_selected_latent_the_picture_is_the_same(drawing):
    source, core, point, batch, means = drawing
    clean = source.forward(batch)
    edit = Unlearn(means, "red", percentile=100, gamma=-30.0)
    assert edit.n_selected == [0] * 5
    with steer(source, core, point, edit):
        assert torch.equal(source.forward(batch), clean)


def test_several_concepts_are_the_union_of_each(means):
    both = Unlearn(means, ["red", "blue"], percentile=98, gamma={"red": -1.0, "blue": -2.0})
    assert sorted(both.latents.tolist()) == [0, 1, 2, 3, 4, 7, 8]
    for name, push in (("red", -1.0), ("blue", -2.0)):
        one = Unlearn(means, name, percentile=98, gamma=push)
        place = [both.latents.tolist().index(i) for i in one.latents.tolist()]
        assert_close(both.factor[:, place][one.chosen], one.factor[one.chosen])


def test_what_cannot_be_unlearnt_is_said(means):
    with pytest.raises(MmsaeError, match="no concept 'pink'"):
        Unlearn(means, "pink")
    with pytest.raises(MmsaeError, match="no label 'digit'"):
        ConceptMeans.measure(core_of(), batches(PLANTED), "digit", NAMES)
    with pytest.raises(MmsaeError, match="no row has the colour white"):
        ConceptMeans.measure(core_of(), batches(PLANTED), "colour", (*NAMES, "white"))
