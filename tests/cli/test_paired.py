"""Dictionaries with a code for each stream, from a store of pairs to codes and results, by the commands."""

import json
from pathlib import Path

import pytest
import torch

import mmsae
from mmsae.cli.main import main
from mmsae.cores import VLSAE, AlignmentAutoencoder, GroupSparse
from mmsae.miniatures.pairs import paired_concepts
from mmsae.spec import ACTS, MODALITIES
from mmsae.store import CodeStore, Store, Writer

ROWS = {"train": 1024, "val": 128, "test": 150}
FAST = [
    "--threads=1", "--trainer.accelerator=cpu", "--model.lr_warmup_steps=5", "--data.batch_size=128",
    "--trainer.max_steps=20",
]  # fmt: skip


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    world = paired_concepts(0, "easy")
    for number, (split, n) in enumerate(ROWS.items()):
        writer = Writer(folder / split, {}, "float32", rows_per_shard=512)
        writer.resume()
        draw = world.draw(n, number)
        ids = torch.arange(n)
        label = (draw.concepts[:, 0] > 0).long()
        writer.add({ACTS: draw.x, "sample_id": ids, "pair_id": ids.clone(), "label.concept": label})
        writer.close()
        writer.finish({"class": "Synthetic"}, {"class": "pairs", "split": split}, {"concept": ["off", "on"]})
    return folder


def fit(pairs, *words):
    """The folder of the run."""
    before = set(Path("runs").glob("*"))
    main(["fit", "--data=Stored", f"--data.store={pairs}", *FAST, *words])
    (run,) = set(Path("runs").glob("*")) - before
    return run


GROUP = [
    "--model.core=GroupSparse", "--model.core.d_latent=64", "--model.core.k=6", "--model.core.mask_probability=0.2",
    "--model.normalise=none", "--data.columns=[pair_id]",
]  # fmt: skip


def test_pairs_become_codes_of_each_stream(pairs):
    run = fit(pairs, *GROUP)
    core = mmsae.load(run)
    assert isinstance(core, GroupSparse)
    assert core.spec.streams == {"image": 32, "text": 32}
    main(["encode", f"--run={run}", "--split=test", "--threads=1", "--accelerator=cpu", "--rows_per_shard=70"])
    codes = CodeStore(run / "codes" / "test", verify="checksum")
    assert len(codes) == 2 * ROWS["test"]
    rows = next(Store(pairs / "test").in_order(1000))
    for number, stream in enumerate(("image", "text")):
        own = codes.columns["stream"] == number
        assert codes.columns["pair_id"][own].tolist() == list(range(ROWS["test"]))
        assert (codes.columns["modality"][own] == MODALITIES[stream]).all()
        want = core.encode_stream(stream, rows[ACTS][stream]).dense()
        assert torch.allclose(codes[:].dense()[torch.from_numpy(own)], want, atol=1e-5)
    main(["evaluate", f"--run={run}", f"--codes={run}/codes", "--threads=1"])
    stored = json.loads((run / "results.json").read_text())
    main(["evaluate", f"--run={run}", "--threads=1"])
    live = json.loads((run / "results.json").read_text())
    assert stored.keys() == live.keys() >= {"Fidelity", "AFA", "FactorRecovery"}
    assert live["Fidelity"]["l0"] == pytest.approx(6, abs=0.2)  # of a code, not of a pair
    assert stored["FactorRecovery"] == pytest.approx(live["FactorRecovery"], rel=1e-4)


def test_vl_sae_learns_behind_an_alignment_autoencoder(pairs, capsys):
    plain = ["--model.normalise=none", "--model.gradient_clip=0"]
    align = fit(pairs, "--model.core=AlignmentAutoencoder", "--model.core.d_latent=24", *plain)
    autoencoder = mmsae.load(align)
    assert isinstance(autoencoder, AlignmentAutoencoder)
    words = ["--model.core=VLSAE", "--model.core.d_latent=64", "--model.core.k=8", "--model.core.aligned=24"]
    for wrong, says in (
        (plain, "give the folder of a trained one"),
        ([f"--model.alignment={align}"], "set normalise=none"),
    ):
        with pytest.raises(SystemExit):
            fit(pairs, *words, *wrong)
        assert says in capsys.readouterr().err
    core = mmsae.load(fit(pairs, *words, *plain, f"--model.alignment={align}"))
    assert isinstance(core, VLSAE)
    x = next(Store(pairs / "test").in_order(1000))[ACTS]
    e = autoencoder.encode(x)
    inside = torch.nn.functional.normalize(e.values[1], dim=-1) @ torch.nn.functional.normalize(core.encoders[0]).T
    want = inside.topk(8, dim=-1).indices.sort(-1).values
    assert (core.encode_stream("text", x["text"]).indices.sort(-1).values == want).all(-1).float().mean() > 0.99
