"""The recipes that need no download end in sensible dictionaries: few dead latents, and less lost than by PCA.

    pytest -m slow tests/test_dictionaries.py

Each is shortened: less data and fewer steps than a user runs, which makes both figures worse, not better.
"""

import json
from pathlib import Path

import pytest
import yaml

from mmsae.cli.main import main

RECIPES = Path(__file__).parents[1] / "recipes"
SHORT = {
    "stories_batchtopk": ["n_train=1500", "n_val=100", "n_test=200"],
    "sounds_batchtopk": ["n_train=600", "n_val=64", "n_test=200"],
    "ecg_jepa_topk": ["n_train=1500", "n_val=100", "n_test=400"],
    "e4_miniature_batchtopk": ["n_train=600", "n_val=64", "n_test=200"],
    "scene_questions_batchtopk": ["n_train=600", "n_val=64", "n_test=150"],
    "scene_diffusion_batchtopk": ["n_train=96", "n_val=32", "n_test=48"],
}
"""Recipe to arguments of its data."""
BOUND = 0.8
"""Most that may be lost, of what PCA loses with as many components in every row."""


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", SHORT)
def test_a_dictionary_beats_pca_and_lives(name, seed, tmp_path, monkeypatch):
    if "diffusion" in name:
        pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    few = [f"--data.init_args.{argument}" for argument in SHORT[name]]
    config = str(RECIPES / f"{name}.yaml")
    main(["extract", "--config", _extraction(config, tmp_path), *few, "--model.out=store", "--threads=1"])
    fit = ["fit", "--config", config, *few, "--data.init_args.store=store", "--trainer.max_steps=600", "--threads=1"]
    main([*fit, f"--seed_everything={seed}", "--trainer.val_check_interval=600", "--trainer.logger=CSVLogger"])
    (run,) = [path.parent for path in Path().rglob("sae") if path.is_dir()]
    main(["evaluate", "--run", str(run), "--analyses=[Fidelity]", "--threads=1"])
    numbers = json.loads((run / "results" / "Fidelity.json").read_text())["numbers"]
    print(name, seed, {key: round(numbers[key], 4) for key in ("fvu", "PCA, same L0/fvu", "l0", "dead_fraction")})
    assert numbers["dead_fraction"] < 0.2
    assert numbers["fvu"] < BOUND * numbers["PCA, same L0/fvu"]


def _extraction(config, folder):
    """The data of a recipe, as `mmsae extract` takes them."""
    data = yaml.safe_load(Path(config).read_text())["data"]
    path = folder / "extract.yaml"
    path.write_text(yaml.safe_dump({"trainer": {"accelerator": "cpu"}, "data": data}))
    return str(path)
