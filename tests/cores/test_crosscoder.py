import pytest
import torch
from synthetic import low_coherence, train
from torch.testing import assert_close

from mmsae.analyses.fidelity import measure
from mmsae.cores import BatchTopKCrosscoder, Crosscoder, TopKCrosscoder
from mmsae.cores.base import Affine, Losses
from mmsae.errors import MmsaeError
from mmsae.spec import ACTS

SPEC, M = {"a": 5, "b": 7, "c": 3}, 20
ROWS = torch.randn(200, 15, generator=torch.Generator().manual_seed(0)) + 0.3


def batch(rows, widths=SPEC):
    return {ACTS: dict(zip(widths, rows.split(list(widths.values()), -1), strict=True))}


def random_core(**arguments):
    torch.manual_seed(0)
    core = Crosscoder(SPEC, M, **arguments)
    with torch.no_grad():
        for p in core.parameters():
            p.normal_()
        core.after_step(1, core.encode(ROWS))
    return core


def test_losses_are_the_formula():
    core = random_core(l1_coefficient=0.7)
    acts = batch(ROWS)[ACTS]
    encoders = dict(zip(SPEC, core.W_enc.split(list(SPEC.values()), -1), strict=True))
    biases = dict(zip(SPEC, core.b_dec.split(list(SPEC.values())), strict=True))
    codes = (sum(acts[s] @ encoders[s].T for s in SPEC) + core.b_enc).relu()
    error = price = 0
    for s in SPEC:
        out = codes @ core.dictionaries[s] + biases[s]
        error = error + (acts[s] - out).pow(2).sum(-1).mean()
        price = price + (codes * core.dictionaries[s].norm(dim=-1)).sum(-1).mean()
        assert_close(core(acts)[s], out, rtol=1e-4, atol=1e-4)
    terms = core.losses(batch(ROWS)).terms
    assert_close(terms["reconstruction"], error)
    assert_close(terms["sparsity"], 0.7 * price)


def test_few_firing_latents_give_a_pair_list_with_the_same_losses():
    core = random_core()
    with torch.no_grad():
        core.b_enc.sub_(10)
    codes = core.encode(ROWS)
    assert codes.indices is not None
    dense = (ROWS @ core.W_enc.T + core.b_enc).relu()
    assert_close(codes.dense(), dense)
    norms = sum(rows.norm(dim=-1) for rows in core.dictionaries.values())
    assert_close(core.losses(batch(ROWS)).terms["sparsity"], 2.0 * (dense @ norms).mean())


def test_streams_are_found_by_name_not_by_order():
    core, acts = random_core(), batch(ROWS)[ACTS]
    assert_close(core.encode(dict(reversed(acts.items()))).dense(), core.encode(ROWS).dense())
    assert list(core(acts)) == ["a", "b", "c"]


def test_shares_are_of_the_decoder_norms_and_survive_folding():
    core = random_core()
    norms = torch.stack([rows.norm(dim=-1) for rows in core.dictionaries.values()], -1)
    want = norms / norms.sum(-1, keepdim=True)
    assert_close(core.shares, want)
    core.fold({s: Affine(torch.zeros(w), torch.tensor(0.1 * w)) for s, w in SPEC.items()})
    assert_close(core.shares, want)


def test_a_target_is_refused():
    with pytest.raises(MmsaeError, match="give 'target' another name"):
        Crosscoder({"a": 3, "target": 3}, M)


def test_it_trains_by_the_module_and_is_scored_over_all_streams(tmp_path):
    import lightning as L

    from mmsae.training.module import SAEModule

    torch.manual_seed(0)
    module = SAEModule(Crosscoder(SPEC, 60, l1_coefficient=0.01), normalise="center_scale", lr_warmup_steps=1,
                       optimizer=lambda p: torch.optim.Adam(p, lr=1e-2))  # fmt: skip
    loader = torch.utils.data.DataLoader([batch(r) for r in ROWS.split(50)], batch_size=None)
    trainer = L.Trainer(max_epochs=100, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                        enable_model_summary=False, accelerator="cpu", default_root_dir=tmp_path)  # fmt: skip
    trainer.fit(module, loader)
    core = module.export()
    out = torch.cat(list(core(batch(ROWS)[ACTS]).values()), -1)
    fvu = float((out - ROWS).pow(2).sum() / (ROWS - ROWS.mean(0)).pow(2).sum())
    assert fvu < 0.3
    assert trainer.validate(module, loader, verbose=False)[0]["val/fvu"] == pytest.approx(fvu, rel=1e-3)


# ---- acceptance test T18


class OneNorm(Crosscoder):
    """The ablation: pays for the norm of all streams together, so that a latent of one stream is not cheap."""

    def losses(self, batch):
        losses = super().losses(batch)
        norms = self.W_dec.norm(dim=-1)
        price = (losses.codes.dense() @ norms).mean()
        return Losses({**losses.terms, "sparsity": self.l1_coefficient * price}, losses.codes, losses.reconstruction)


SIDES = {"a": 40, "b": 40}


def paired_rows(seed, n):
    """24 features that both streams have, 8 of each alone: rows `[n, 80]`, and each feature's rows in both streams."""
    n_features, shared = 40, 24
    features = torch.stack([low_coherence(n_features, 40, seed + 1000 * side) for side in range(2)], 1)
    features[shared : shared + 8, 1] = 0
    features[shared + 8 :, 0] = 0
    g = torch.Generator().manual_seed(seed + 77)
    on = torch.rand(n, n_features, generator=g) < 0.1
    codes = on * (0.5 + torch.rand(n, n_features, generator=g))
    return (codes @ features.flatten(1)) + 0.02 * torch.randn(n, 80, generator=g), features


def told_apart(core, features):
    """Share of shared and of exclusive features whose best latent has the share that it should have."""
    rows, truth = core.W_dec.detach(), features.flatten(1)
    cosines = (truth / truth.norm(dim=-1, keepdim=True)) @ (rows / rows.norm(dim=-1, keepdim=True)).T
    ratio = core.shares[cosines.argmax(1), 1]
    right = torch.cat([(ratio[:24] - 0.5).abs() < 0.25, ratio[24:32] < 0.1, ratio[32:] > 0.9]).float()
    return float(right[:24].mean()), float(right[24:].mean()), ratio


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_t18_shared_and_exclusive_features_are_told_apart(seed):
    torch.set_num_threads(1)
    pool, features = paired_rows(seed, 30_000)
    seen = {}
    for cls in (Crosscoder, OneNorm):
        torch.manual_seed(300 + seed)
        core = cls(SIDES, 64, l1_coefficient=0.15)
        train(core, pool, 2500, 256, seed=400 + seed, lr=2e-3, batches=lambda rows: batch(rows, SIDES))
        shared, exclusive, ratio = told_apart(core.eval(), features)
        leak = float(torch.cat([ratio[24:32], 1 - ratio[32:]]).mean())  # of exclusive features into the other stream
        seen[cls.__name__] = shared, exclusive, float(ratio[:24].median()), leak
    print(seed, seen)
    shared, exclusive, _, leak = seen["Crosscoder"]
    assert shared >= 0.95
    assert exclusive >= 0.95
    # one norm for all streams tells them apart too where features are this clean, but leaks into the other stream
    assert leak < 0.2 * seen["OneNorm"][3]


def test_fidelity_is_measured_over_all_streams():
    torch.manual_seed(0)
    core = Crosscoder({"one": 5, "other": 7}, 16, l1_coefficient=0.1).eval()
    acts = {"one": torch.randn(40, 5).half(), "other": torch.randn(40, 7).half()}
    fvu = measure({"core": core}, [{ACTS: acts}])["core"].compute()["fvu"]
    x = torch.cat([t.float() for t in acts.values()], -1)
    with torch.no_grad():
        out = torch.cat(list(core({name: t.float() for name, t in acts.items()}).values()), -1)
    assert float(fvu) == pytest.approx(float((x - out).pow(2).sum() / (x - x.mean(0)).pow(2).sum()), rel=1e-5)


# ---- the forms that keep a number of latents

FORMS = [lambda **a: TopKCrosscoder(SPEC, M, k=4, **a), lambda **a: BatchTopKCrosscoder(SPEC, M, k=4, **a)]


def stepped(make, steps=10, **arguments):
    torch.manual_seed(0)
    core = make(**arguments).train()
    core.start(batch(ROWS))
    optimizer = torch.optim.Adam(core.parameter_groups(), lr=1e-2)
    for step in range(1, steps + 1):
        losses = core.losses(batch(ROWS))
        optimizer.zero_grad()
        sum(losses.terms.values()).backward()
        core.before_step()
        optimizer.step()
        core.after_step(step, losses.codes.detach())
    return core


@pytest.mark.parametrize("make", FORMS, ids=["TopK", "BatchTopK"])
def test_selection_is_by_code_times_summed_norms(make):
    """Against the formula, in another unit for every latent, which changes neither selection nor output."""
    core = stepped(make).requires_grad_(False)
    unit = 0.1 + torch.rand(M)
    w_enc, b_enc, w_dec = core.W_enc / unit[:, None], core.b_enc / unit, core.W_dec * unit[:, None]
    codes = (ROWS @ w_enc.T + b_enc).relu()
    scores = codes * sum(rows.norm(dim=-1) for rows in w_dec.split(list(SPEC.values()), -1))
    if isinstance(core, BatchTopKCrosscoder):
        core.train()
        kept = scores >= scores.flatten().topk(4 * len(ROWS)).values.min()
    else:
        kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(4).indices, True)
    assert_close(core.encode(ROWS).dense() > 0, kept & (scores > 0))
    out = torch.cat(list(core(batch(ROWS)[ACTS]).values()), -1)
    assert_close(out, (codes * kept) @ w_dec + core.b_dec, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", FORMS, ids=["TopK", "BatchTopK"])
def test_a_step_keeps_the_summed_norms_and_what_is_reconstructed(make):
    core = stepped(make)
    assert_close(core.decoder_norms(), torch.ones(M))
    with torch.no_grad():
        core.W_dec.mul_(1.5)  # as if the optimizer had
        core.train()
        kept = core.encode(ROWS)
        before = core.joined(core.decode(kept))
        core.after_step(11, kept)
        assert_close(core.joined(core.decode(core.encode(ROWS))), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [*FORMS, lambda **a: Crosscoder(SPEC, M, l1_coefficient=0.1, **a)],
                         ids=["TopK", "BatchTopK", "ReLU"])  # fmt: skip
def test_exclusive_latents_never_meet_another_stream(make):
    core = stepped(make, exclusive=0.2, **({} if make not in FORMS else {"dead_after": 1}))
    assert [list(core.exclusive_to(s)) for s in SPEC] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    for number, stream in enumerate(SPEC):
        own = core.exclusive_to(stream)
        assert (core.shares[own.start : own.stop, number] == 1).all()
        for table in (core.W_enc, core.W_dec):
            for other, columns in core.by_stream(table).items():
                assert (columns[own.start : own.stop] != 0).any() == (other == stream)
    assert ((core.shares[12:] > 0) & (core.shares[12:] < 1)).all()
    with pytest.raises(MmsaeError, match=r"exclusive=0.4 is out of range"):
        make(exclusive=0.4)


class OneNormTopK(TopKCrosscoder):
    """The ablation: codes count by the norm of all streams together."""

    def decoder_norms(self):
        return self.W_dec.norm(dim=-1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_t18_for_the_forms_that_keep_a_number(seed):
    torch.set_num_threads(1)
    pool, features = paired_rows(seed, 30_000)
    seen = {}
    for name, cls, exclusive in (
        ("TopK", TopKCrosscoder, 0), ("one norm", OneNormTopK, 0), ("dedicated", TopKCrosscoder, 0.25),
        ("BatchTopK", BatchTopKCrosscoder, 0),
    ):  # fmt: skip
        torch.manual_seed(300 + seed)
        core = cls(SIDES, 64, k=4, exclusive=exclusive, dead_after=20 * 256)
        train(core, pool, 2500, 256, seed=400 + seed, lr=2e-3, batches=lambda rows: batch(rows, SIDES))
        shared, exclusive, ratio = told_apart(core.eval(), features)
        seen[name] = shared, exclusive, float(torch.cat([ratio[24:32], 1 - ratio[32:]]).mean())
    print(seed, seen)
    for name in ("TopK", "BatchTopK"):
        assert min(seen[name][:2]) >= 0.95
    assert seen["dedicated"][1] >= 0.95  # the 32 latents left for 24 shared features miss two of them with seed 0
    assert seen["TopK"][2] < 0.8 * seen["one norm"][2]
    assert seen["dedicated"][2] < 0.8 * seen["TopK"][2]
