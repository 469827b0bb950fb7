"""The comparison on pairs and the measurement of hallucination: they run, go on where they stopped, and judge right."""

import json
from pathlib import Path

import pytest
from PIL import Image

from mmsae.errors import MmsaeError

RECIPES = Path(__file__).parent.parent / "recipes"


@pytest.fixture
def recipes(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))


def test_a_quick_run_writes_a_table_and_is_not_repeated(recipes, tmp_path, capsys, monkeypatch):
    import compare_cross_modal as recipe

    arguments = ["--quick", "--worlds", "scenes", "--seeds", "0", "--out", str(tmp_path)]
    names = ["GSAE", "TopK", "TopK per stream, matched", "GSAE, shuffled pairs", "random", "embeddings"]
    assert recipe.main([*arguments, "--contenders", *names]) == 0
    held = json.loads((tmp_path / "results.json").read_text())
    assert set(held["results"]) == {f"scenes/{name}/0" for name in names}
    own = held["results"]["scenes/GSAE/0"]
    assert {"fvu", "both", "dead", "r@1", "cross_recovery", "sets", "mms", "control"} <= set(own)
    assert own["l0"] <= 16
    assert "| TopK per stream, matched |" in (tmp_path / "table.md").read_text()

    trained = []
    run = recipe.run
    monkeypatch.setattr(recipe, "run", lambda job, *rest: trained.append(job.name) or run(job, *rest))
    del held["results"]["scenes/TopK/0"]
    (tmp_path / "results.json").write_text(json.dumps(held))
    recipe.main([*arguments, "--contenders", *names])
    assert trained == ["TopK"]
    with pytest.raises(MmsaeError, match="results of other settings"):
        recipe.main([*arguments, "--k", "5"])
    with pytest.raises(MmsaeError, match="there is no 'GSEA'; nearest: GSAE"):
        recipe.main([*arguments, "--contenders", "GSEA"])


def test_claims_are_judged_on_means_and_most_seeds(recipes):
    from cross_modal_report import Job, Results, judge

    def results(ours, theirs, fvu=(1.0, 1.0, 1.0)):
        figures = {}
        for seed in range(3):
            figures[Job("scenes", "GSAE", seed)] = {"both": ours[seed], "fvu": 0.1 * fvu[seed]}
            figures[Job("scenes", "TopK", seed)] = {"both": theirs[seed], "fvu": 0.1}
        return {(v.claim.name, v.claim.metric): v for v in judge(Results(figures), ["scenes"], [0, 1, 2])}

    clear = results((0.6, 0.7, 0.8), (0.5, 0.5, 0.5), fvu=(1.04, 1.04, 1.06))
    assert clear["GSAE", "both"].holds
    assert clear["GSAE", "both"].wins == 3
    assert clear["GSAE", "fvu"].holds  # within 5 % on the mean, and on two seeds of three
    assert not results((0.6, 0.4, 0.4), (0.5, 0.5, 0.5))["GSAE", "both"].holds
    assert not results((0.9, 0.4, 0.4), (0.5, 0.5, 0.5))["GSAE", "both"].holds  # a mean above, by one seed
    assert not results((0.6, 0.6, 0.6), (0.5, 0.5, 0.5), fvu=(1.1, 1.1, 1.0))["GSAE", "fvu"].holds


def test_hallucination_is_measured_on_annotation_files(recipes, tmp_path, monkeypatch, capsys):
    """A run of both stages on a small model, asked the questions of a POPE file and for captions of COCO's pictures."""
    pytest.importorskip("transformers")
    import reduce_hallucination as recipe

    from mmsae.cli.main import main

    monkeypatch.chdir(tmp_path)
    few = ["--data.n_train=16", "--data.n_val=8", "--data.n_test=8", "--data.batch_size=8", "--threads=1"]
    few += ["--model.lr_warmup_steps=0", "--trainer.max_steps=2"]
    main(["fit", "--config", str(RECIPES / "scene_lmm_alignment.yaml"), *few, "--model.core.d_latent=12"])
    (first,) = Path("runs").glob("*")
    small = ["--model.core.d_latent=64", "--model.core.k=8", "--model.core.aligned=12", f"--model.alignment={first}"]
    main(["fit", "--config", str(RECIPES / "scene_lmm_vlsae.yaml"), *few, *small])
    (run,) = set(Path("runs").glob("*")) - {first}
    Path("pictures").mkdir()
    for i in range(3):
        Image.new("RGB", (64, 64), (80 * i, 60, 90)).save(f"pictures/{i}.png")
    rows = [{"question_id": i, "image": f"{i}.png", "text": f"is there a {w}?", "label": x}
            for i, (w, x) in enumerate((("two", "yes"), ("red digit", "no"), ("six", "no")))]  # fmt: skip
    Path("coco_pope_random.json").write_text("\n".join(map(json.dumps, rows)))
    Path("synonyms.txt").write_text("digit, number\nflower, blossom\n")
    Path("instances.json").write_text(json.dumps({
        "images": [{"id": i, "file_name": f"{i}.png"} for i in range(3)],
        "categories": [{"id": 1, "name": "digit"}, {"id": 2, "name": "flower"}],
        "annotations": [{"image_id": i, "category_id": 1} for i in range(3)],
    }))  # fmt: skip
    asked = ["--run", str(run), "--images", "pictures", "--questions", "coco_pope_random.json", "--suffix", ""]
    asked += ["--instances", "instances.json", "--synonyms", "synonyms.txt", "--n", "3", "--out", "out"]
    ways = ["--ways", "the model alone", "concepts"]
    recipe.main([*asked, *ways])
    held = json.loads(Path("out/results.json").read_text())["results"]
    assert set(held) == {f"{a}/{b}" for a in ("coco_pope_random", "chair") for b in ("the model alone", "concepts")}
    assert held["coco_pope_random/concepts"]["n"] == 3
    assert 0 <= held["chair/the model alone"]["chair_s"] <= 1
    assert "| concepts |" in Path("out/table.md").read_text()
    for wrong, said in (
        (["--run", str(run)], "give --images"),
        (["--run", str(run), "--images", "pictures"], "nothing to ask"),
        ([*asked[:4], "--instances", "instances.json"], "CHAIR needs --synonyms"),
    ):
        with pytest.raises(MmsaeError, match=said):
            recipe.main([*wrong, "--out", "other"])
