"""Gradients and end-to-end training from the command line, on the embedded miniature."""

from pathlib import Path

import pytest
import torch

import mmsae
from mmsae.cli.main import main
from mmsae.store import Store

SCENES = [
    "--data=Scenes", "--data.source=SceneCLIP", "--data.source.hook_points=[visual.transformer.resblocks.1]",
    "--data.n_train=40", "--data.n_val=10", "--data.n_test=10",
]  # fmt: skip
FAST = ["--threads=1", "--trainer.accelerator=cpu", "--trainer.max_steps=4"]


@pytest.fixture
def run_of(capsys):
    def run(*words):
        main(["fit", *words, *FAST])
        return Path("runs/version_0")

    return run


def test_gradients_from_extraction_to_dictionary(run_of, refused):
    main(["extract", *SCENES, "--data.gradients=true", "--model.out=store", "--trainer.accelerator=cpu"])
    core = ["--model.core=GradientTopK", "--model.core.d_latent=64", "--model.core.k=4"]
    stored = ["--data=Stored", "--data.store=store", "--data.batch_size=256"]
    assert Store("store/train").manifest.gradients
    run = run_of(*stored, "--data.gradients=true", *core)
    trained = mmsae.load(run)
    assert type(trained).__name__ == "GradientTopK"
    assert 0 < trained.gradient_norm < 1
    assert "set data.gradients=true" in refused("fit", *stored, *core)


def test_end_to_end(run_of, refused):
    core = ["--model.core=TopK", "--model.core.d_latent=64", "--model.core.k=4"]
    whole = ["--data.whole_examples=true", "--data.batch_size=8"]
    run = run_of(*SCENES, *whole, *core, "--model.end_to_end.loss=kl", "--model.end_to_end.local=0.1")
    assert torch.isfinite(mmsae.load(run).W_dec).all()
    assert "data.whole_examples=true" in refused("fit", *SCENES, *core, "--model.end_to_end.loss=kl")
