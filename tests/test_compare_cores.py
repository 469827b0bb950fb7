"""The comparison of all cores: it runs, goes on where it was stopped, and judges what it claims to judge."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mmsae.cores import SAECore, SharedDictionary
from mmsae.errors import MmsaeError
from mmsae.miniatures.worlds import WORLDS
from mmsae.subclasses import subclasses

RECIPES = Path(__file__).parent.parent / "recipes"


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    import compare_cores

    return compare_cores


def test_a_quick_run_writes_a_table_and_a_plot_and_is_not_repeated(recipe, tmp_path, capsys, monkeypatch):
    arguments = ["--quick", "--worlds", "absorb", "modalities", "--out", str(tmp_path), "--cores",
                 "TopK", "ReLU", "Crosscoder", "SkipTranscoder", "PCA", "NMF"]  # fmt: skip
    assert recipe.main(arguments) == 0
    assert "skipped: Crosscoder on 1 of 2 worlds: needs two streams" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert set(results) == {
        *(f"{world}/{core}/0" for world in ("absorb", "modalities") for core in ("TopK", "ReLU", "PCA", "NMF")),
        "modalities/Crosscoder/0", "modalities/SkipTranscoder/0",
    }  # fmt: skip
    assert results["absorb/TopK/0"]["l0"] == pytest.approx(2, abs=0.05)  # the world's, rounded up
    assert 0 < results["absorb/TopK/0"]["fvu"] < 1
    assert {"absorbed", "silent"} <= set(results["absorb/TopK/0"])
    assert {"leak", "told_apart"} <= set(results["modalities/Crosscoder/0"])
    table = (tmp_path / "table.md").read_text()
    assert "| core | absorb | modalities |" in table
    assert (tmp_path / "compare_cores.png").read_bytes().startswith(b"\x89PNG")

    del results["modalities/ReLU/0"]
    results["absorb/TopK/0"]["fvu"] = 123.0
    held = json.loads((tmp_path / "results.json").read_text()) | {"results": results}
    (tmp_path / "results.json").write_text(json.dumps(held))
    trained = []
    train = recipe.train

    def watched(jobs, *rest):
        trained.extend(jobs)
        return train(jobs, *rest)

    monkeypatch.setattr(recipe, "train", watched)
    recipe.main(arguments)
    assert [job.key for job in trained] == ["modalities/ReLU/0"]
    assert "123" in (tmp_path / "table.md").read_text()

    with pytest.raises(MmsaeError, match="results of other settings"):
        recipe.main([*arguments[1:], "--steps", "50"])


def test_company_does_not_change_a_core(recipe):
    """Cores trained in one pass end where they would by themselves."""
    settings = recipe.Settings(40, 64, 1e-2, 2000, 1000)
    jobs = [recipe.Job("zipf", core, 0) for core in ("BatchTopK", "ReLU")]
    together = recipe.train(jobs, settings)
    given = recipe.data("zipf", 0, 2000, 1000)
    for job, core in zip(jobs, together, strict=True):
        (alone,) = recipe.train([job], settings)
        assert recipe.measure(core, given) == pytest.approx(recipe.measure(alone, given), rel=1e-3, abs=1e-3)


def test_prices_move_until_l0_is_there(recipe):
    settings = recipe.Settings(300, 128, 1e-2, 5000, 2000)
    (core,) = recipe.train([recipe.Job("absorb", "Gated", 0)], settings)
    given = recipe.data("absorb", 0, 5000, 2000)
    assert recipe.measure(core, given)["l0"] == pytest.approx(given.k, rel=0.25)


@pytest.mark.parametrize("name", subclasses(SAECore))
def test_every_core_is_built_for_some_world_or_says_why_not(recipe, name):
    cls = subclasses(SAECore)[name]
    if not cls.__module__.startswith("mmsae."):
        pytest.skip("of another test")
    settings, world = recipe.Settings(600, 256, 1e-2, 1000, 1000), WORLDS["modalities"](0)
    reason = recipe.refused(cls, world)
    if reason:
        assert cls.needs or issubclass(cls, SharedDictionary)
        assert reason.startswith("needs ")
        return
    widths = {stream: x.shape[1] for stream, x in recipe.streams(cls, world, world.features).items()}
    core = recipe.build(cls, recipe.ActivationSpec(widths), world.k, len(world.features), settings)
    at_most = sum(widths.values()) if name == "Neurons" else len(world.features) + world.k  # groups are of equal size
    assert core.d_latent <= at_most


def test_claims_are_judged_by_the_mean_over_the_seeds(recipe):
    from cores_report import Claim, Results, judge

    numbers = {}
    for core, values in {"AbsTopK": (0.1, 0.3), "TopK": (0.3, 0.6)}.items():
        for seed, fvu in enumerate(values):
            numbers[recipe.Job("bipolar", core, seed)] = {"fvu": fvu}
    numbers[recipe.Job("bipolar", "AbsTopK", 0, 2.0)] = {"fvu": 9.0}  # of another budget
    (verdict,) = judge(Results(numbers))  # those whose cores did not run are not judged
    assert verdict.holds
    assert (verdict.mine, verdict.other) == pytest.approx((0.2, 0.45))
    assert verdict.by_seed == ".10 .30 against .30 .60"
    numbers[recipe.Job("bipolar", "AbsTopK", 1)] = {"fvu": 0.4}
    assert judge(Results(numbers))[0].mark == "does not show"
    alone = Claim("", "bipolar", "fvu", "TopK", "", ">=", 1, 0.4)
    assert alone.holds(Results(numbers))[0]


def test_a_claim_that_fails_ends_with_status_1(recipe, tmp_path, monkeypatch, capsys):
    import cores_report

    impossible = cores_report.Claim("Nothing is left", "absorb", "fvu", "TopK", "", "<=", 1, -1)
    monkeypatch.setattr(cores_report, "claims", lambda: [impossible])
    small = ["--steps", "40", "--batch_size", "64", "--n_train", "1000", "--n_test", "1000"]
    assert recipe.main([*small, "--worlds", "absorb", "--cores", "TopK", "--out", str(tmp_path)]) == 1
    assert "does not show: Nothing is left" in capsys.readouterr().out
    assert "| does not show | Nothing is left |" in (tmp_path / "table.md").read_text()
    monkeypatch.setattr(cores_report, "NEGATIVES", {("absorb", "TopK")})
    assert recipe.main([*small, "--worlds", "absorb", "--cores", "TopK", "--out", str(tmp_path)]) == 0
    assert "does not show, as documented: Nothing is left" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cores", "TopKK"], "Error: there is no core 'TopKK'; nearest: "),
        (["--worlds", "zip"], "Error: there is no world 'zip'; nearest: zipf."),
        (["--steps", "3"], "Error: steps=3 is out of range: it must be at least 30."),
    ],
    ids=str,
)
def test_a_wrong_argument_is_one_sentence(recipe, arguments, said, tmp_path, capsys):
    with pytest.raises(MmsaeError) as caught:
        recipe.main([*arguments, "--out", str(tmp_path)])
    assert f"Error: {caught.value}".startswith(said)
    assert not (tmp_path / "results.json").exists()


@pytest.mark.slow
def test_as_a_script_it_prints_the_sentence_without_a_traceback():
    done = subprocess.run(
        [sys.executable, str(RECIPES / "compare_cores.py"), "--cores", "TopKK"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Error: there is no core 'TopKK'; nearest: TopK")
    assert "Traceback" not in done.stderr
