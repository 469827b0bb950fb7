"""From pairs of scenes and captions to a page with concept sets, by the commands."""

import json
from pathlib import Path

import pytest

from mmsae.cli.main import main

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("union", [False, True])
def test_pairs_become_figures_and_a_page(union, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    few = ["--data.n_train=64", "--data.n_val=48", "--data.n_test=48", "--threads=1", "--trainer.max_steps=20"]
    small = ["--model.core.d_latent=64", "--model.core.k=6", "--trainer.val_check_interval=20"]
    if union:
        small = ["--model.core=TopK", *small, "--data.source.union=true", "--data.columns=[]"]
    main(["fit", "--config", str(RECIPES / "scene_pairs_gsae.yaml"), *few, *small])
    (run,) = Path("runs").glob("*")
    main(["evaluate", f"--run={run}", "--analyses=[CrossModal,ZeroShotConcepts,TopExamples]", "--threads=1"])
    printed = capsys.readouterr().out
    assert "CrossModal: Do latents mean the same?" in printed
    numbers = json.loads((run / "results.json").read_text())
    assert numbers["ZeroShotConcepts"]["dictionary/base"] > 0.9
    assert numbers["CrossModal"]["dense/cross_recovery"] > 0.6
    shown = json.loads((run / "results" / "TopExamples.json").read_text())["latents"]
    assert [side["name"] for side in shown[0]["sides"]] == ["image", "text"]
    main(["report", f"--run={run}"])
    page = (run / "report.html").read_text()
    assert page.index("latents fire in both streams") < page.index('id="latents"')
