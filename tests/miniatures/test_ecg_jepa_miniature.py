import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch.testing import assert_close

from mmsae.cores import PCA, TopK
from mmsae.encoders import ECGJEPA, read_encoder
from mmsae.errors import MmsaeError
from mmsae.miniatures.ecgs import CLASSES, LEADS, ECGs, probe_auc
from mmsae.sources.weights import located

ROOT = Path(__file__).parents[2]
FOLDER = Path(located("miniature:ecg_jepa"))
TINY = {"steps": 6, "batch_size": 4, "dim": 16, "depth": 1, "heads": 2, "n_train": 20, "n_test": 10}


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("train_ecg_jepa", ROOT / "recipes" / "train_ecg_jepa.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_files_that_ship_are_small():
    assert {path.name for path in FOLDER.iterdir()} == {"config.json", "model.safetensors"}
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 1e6


def test_s3_its_tokens_know_more_than_those_of_a_random_encoder(recipe):
    """Other records than the documented ones, which were of seed 0."""
    encoder, content = read_encoder(FOLDER)
    assert content["preprocess"]["channels"] == list(LEADS)
    signals, labels = ECGs("test", 500, seed=5).arrays()
    x = recipe.standardised(signals, content)
    torch.manual_seed(0)
    untrained = ECGJEPA(**content["config"]).eval()
    ours, theirs = (probe_auc(recipe.pooled(model, x), labels) for model in (encoder, untrained))
    assert ours >= theirs + 0.03
    documented = {name: np.mean(values) for name, values in content["probe_auc"].items()}
    assert documented["context"] >= documented["random"] + 0.03
    assert ours == pytest.approx(documented["context"], abs=0.03)


def test_a_run_that_was_interrupted_ends_at_the_same_weights(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(
        recipe, "probe_auc", lambda features, labels, seeds: float(features.std())
    )  # a regression is slow
    recipe.train(str(tmp_path / "whole"), **TINY)
    saved = recipe.save

    def stop(path, tensors, metadata):
        saved(path, tensors, metadata)
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        recipe.train(str(tmp_path / "parts"), **TINY, checkpoint_every=3)
    monkeypatch.setattr(recipe, "save", saved)
    with pytest.raises(MmsaeError, match="was made with other settings"):
        recipe.train(str(tmp_path / "parts"), **{**TINY, "lr": 1e-4}, checkpoint_every=3)
    recipe.train(str(tmp_path / "parts"), **TINY, checkpoint_every=3)
    whole, parts = (read_encoder(tmp_path / name)[0].state_dict() for name in ("whole", "parts"))
    assert_close(parts, whole, rtol=0, atol=0)
    assert {p.name for p in (tmp_path / "parts").iterdir()} == {"config.json", "model.safetensors"}
    told = [json.loads((tmp_path / name / "config.json").read_text())["probe_auc"] for name in ("whole", "parts")]
    assert told[0] == told[1]


@pytest.mark.slow
def test_s5_a_dictionary_of_its_tokens(recipe):
    """It explains them far better than PCA, keeps their classes, and its latents live.

    One latent says more than one of a random encoder's dictionary.
    """
    torch.set_num_threads(1)
    encoder, content = read_encoder(FOLDER)
    torch.manual_seed(0)
    untrained = ECGJEPA(**content["config"]).eval()
    train, _ = ECGs("train", 1500, seed=1).arrays()
    test, labels = ECGs("test", 1300, seed=1).arrays()
    train, test = (recipe.standardised(x, content) for x in (train, test))
    found = {}
    for name, model in {"trained": encoder, "random": untrained}.items():
        rows, tokens = (tokens_of(model, x) for x in (train, test))
        mean = rows.flatten(0, 1).mean(0)
        core = dictionary(rows.flatten(0, 1) - mean)
        centred = (tokens - mean).flatten(0, 1)
        with torch.no_grad():
            codes = core.encode(centred)
            fvu = (centred - core.decode(codes)).square().sum() / (centred - centred.mean(0)).square().sum()
        most = codes.dense().view(*tokens.shape[:2], -1).amax(1).numpy()  # over the tokens of a record
        found[name] = float(fvu), probe_auc(most, labels, seeds=(0,)), best_latents(most, labels)
        dense = probe_auc(tokens.mean(1).numpy(), labels, seeds=(0,))
        if name == "trained":
            pca = PCA(rows.shape[2], k=8)
            pca.partial_fit({"acts": {"x": (rows - mean).flatten(0, 1)}})
            pca.count(torch.ones(rows.shape[2]), rows.shape[0] * rows.shape[1])
            pca.finish()
            lost = (centred - pca.decode(pca.encode(centred))).square().sum()
            assert fvu < 0.5 * lost / (centred - centred.mean(0)).square().sum()
            assert (codes.dense() != 0).any(0).float().mean() > 0.8
            assert found[name][1] >= dense - 0.05
    assert found["trained"][2] >= found["random"][2] + 0.02, found


@torch.no_grad()
def tokens_of(encoder, x):
    """Without the register, `[n, T, d]`."""
    return torch.cat([encoder(part)[:, encoder.n_registers :] for part in x.split(100)])


def dictionary(rows, steps=1500):
    torch.manual_seed(0)
    core, g = TopK(rows.shape[1], d_latent=512, k=8), torch.Generator().manual_seed(0)
    core.start({"acts": {"x": rows[:4096]}})
    optimizer = torch.optim.Adam(core.parameters(), lr=2e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 100)
        losses = core.losses({"acts": {"x": rows[torch.randint(len(rows), (1024,), generator=g)]}})
        optimizer.zero_grad()
        sum(losses.terms.values()).backward()
        optimizer.step()
        core.after_step(step, losses.codes)
    return core.eval()


def best_latents(values, labels, n_choose=300):
    """AUC of the best single latent of each class, chosen on the first records and measured on the others, mean."""
    found = []
    for kind in range(len(CLASSES)):
        choose, measure = ((labels[part] == kind, values[part]) for part in (slice(n_choose), slice(n_choose, None)))
        auc = np.array([roc_auc_score(choose[0], column) for column in choose[1].T])
        best = np.abs(auc - 0.5).argmax()
        tested = roc_auc_score(measure[0], measure[1][:, best])
        found.append(tested if auc[best] > 0.5 else 1 - tested)
    return float(np.mean(found))
