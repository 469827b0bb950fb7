import math

import pytest
import torch
from synthetic import train
from torch.nn.functional import normalize
from torch.testing import assert_close

from mmsae.cores import AlignmentAutoencoder
from mmsae.cores.alignment_autoencoder import info_nce
from mmsae.metrics.code_retrieval import retrieval
from mmsae.spec import ACTS

SPEC, D, N = {"image": 7, "text": 5}, 6, 20
X = {s: torch.randn(N, w, generator=torch.Generator().manual_seed(w)) for s, w in SPEC.items()}


@pytest.mark.parametrize("cosine", [True, False])
def test_losses_are_the_formula(cosine):
    torch.manual_seed(0)
    core = AlignmentAutoencoder(SPEC, D, temperature=0.2, normalize_contrastive=cosine)
    e = [X[s] @ core.encoders[i].T + core.b_enc[i] for i, s in enumerate(SPEC)]
    out = [e[i] @ core.decoders[i] + core.b_dec[i] for i in range(2)]
    v, t = (normalize(part, dim=-1) if cosine else part for part in e)
    scores = (v @ t.T / 0.2).exp()
    own = scores.diagonal()
    contrast = -((own / scores.sum(1)).log().mean() + (own / scores.sum(0)).log().mean()) / 2
    losses = core.losses({ACTS: X})
    assert_close(losses.terms["contrastive"], contrast)
    assert_close(losses.terms["reconstruction"], sum((X[s] - o).pow(2).mean() for s, o in zip(X, out, strict=True)))
    assert_close(losses.codes.values, torch.stack(e))


def test_rows_of_one_pair_are_no_negatives_and_unpaired_rows_take_no_part():
    logits = torch.randn(4, 4)
    ids = torch.tensor([3, 8, 3, 9])
    own = logits.diagonal()
    kept = logits.exp() * ~((ids[:, None] == ids) & ~torch.eye(4, dtype=torch.bool))
    want = -((own - kept.sum(1).log()).mean() + (own - kept.sum(0).log()).mean()) / 2
    assert_close(info_nce(logits, ids), want)
    torch.manual_seed(0)
    core = AlignmentAutoencoder(SPEC, D)
    pairs = torch.arange(N)
    pairs[10:] = -1
    found = core.losses({ACTS: X, "pair_id": pairs}).terms
    some = core.losses({ACTS: {s: x[:10] for s, x in X.items()}}).terms
    assert_close(found["contrastive"], some["contrastive"])
    nobody = core.losses({ACTS: X, "pair_id": -torch.ones(N, dtype=torch.int64)}).terms
    assert float(nobody["contrastive"].detach()) == 0


def implicit(seed, n):
    """Hidden states of two streams that share what they are about, each in its own frame, beside much of their own."""
    g = torch.Generator().manual_seed(seed)
    about = torch.randn(n, 6, generator=g)
    rows = []
    for number in range(2):
        mix = torch.randn(6 + 10, 24, generator=torch.Generator().manual_seed(number))
        rows.append(torch.cat([about, 1.5 * torch.randn(n, 10, generator=g)], 1) @ mix / 4)
    return torch.cat(rows, 1)


def batches(rows):
    return {ACTS: dict(zip(("image", "text"), rows.split(24, -1), strict=True))}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_makes_an_implicit_alignment_explicit(seed):
    """Held-out pairs find each other by cosine, and hidden states come back; shuffled pairs teach the latter alone."""
    torch.set_num_threads(1)
    pool, held = implicit(seed, 4000), batches(implicit(seed + 100, 500))
    shuffled = torch.cat(
        [pool[:, :24], pool[torch.randperm(4000, generator=torch.Generator().manual_seed(seed)), 24:]], 1
    )
    seen = {}
    for name, rows in (("true", pool), ("shuffled", shuffled)):
        torch.manual_seed(seed)
        core = AlignmentAutoencoder({"image": 24, "text": 24}, 24)
        train(core, rows, 600, 256, seed=seed, lr=2e-3, batches=batches)
        with torch.no_grad():
            e = core.eval().encode(held[ACTS]).values
            out = core(held[ACTS])
        errors = [float((held[ACTS][s] - out[s]).pow(2).sum() / held[ACTS][s].pow(2).sum()) for s in out]
        seen[name] = retrieval(e[0], e[1])["r@1"], max(errors)
    raw = retrieval(held[ACTS]["image"], held[ACTS]["text"])["r@1"]
    print(seed, seen, raw)
    assert seen["true"][0] > 0.5
    assert seen["true"][1] < 0.1
    assert seen["shuffled"][0] < 0.05
    assert raw < 0.05
    assert math.isfinite(seen["shuffled"][1])
