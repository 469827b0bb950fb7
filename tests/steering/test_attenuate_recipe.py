"""The recipe that compares APP with masking on the miniature language model."""

import json
import sys
from pathlib import Path

import pytest

from mmsae.cli.main import main

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    yield __import__("attenuate_concept")
    sys.modules.pop("attenuate_concept", None)


def test_removal_is_compared_where_it_is_equal(recipe):
    """On a path from nothing: linear between neighbours, the first time that it is reached."""
    path = [(0.2, 0.1), (0.6, 0.3), (0.5, 0.9)]
    assert recipe.at_equal_removal(path, 0.1) == pytest.approx(0.05)
    assert recipe.at_equal_removal(path, 0.4) == pytest.approx(0.2)
    assert recipe.at_equal_removal(path, 0.55) == pytest.approx(0.275)
    assert recipe.at_equal_removal(path, 0.7) is None
    assert recipe.at_equal_removal([(0.0, 0.1), (0.5, 0.4)], 0.25) == pytest.approx(0.25)


@pytest.mark.slow
def test_the_recipe_runs(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recipe, "NUMBERS", (2, 10))
    sizes = [f"--data.init_args.{name}={n}" for name, n in {"n_train": 120, "n_val": 4, "n_test": 60}.items()]
    main(["fit", "--config", str(RECIPES / "stories_batchtopk.yaml"), *sizes, "--trainer.max_steps=30", "--threads=1",
          "--data.init_args.chunk_rows=8192", "--trainer.val_check_interval=30"])  # fmt: skip
    recipe.main(["--run", "runs/version_0", "--values", "dog", "--stories", "6", "--threads", "1"])
    assert "APP against masking at equal removal" in capsys.readouterr().out
    found = json.loads(Path("runs/version_0/results/Attenuation-animal.json").read_text())
    each = found["tables"][1]["rows"]
    assert [row[:3] for row in each] == [["dog", way, n] for way in recipe.SELECTIONS for n in (2, 10)]
    assert all(row[3] <= 1 for row in each)
    with pytest.raises(SystemExit, match="no animal with cow"):
        recipe.main(["--run", "runs/version_0", "--values", "cow"])
