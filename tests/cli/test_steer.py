"""`mmsae steer` and `mmsae steer bench`, on the model that ships."""

import json

import pytest
import torch

from mmsae.cli.main import main
from mmsae.cli.where import where_of
from mmsae.errors import MmsaeError
from mmsae.steering.context import Context

SMALL = {"n_train": 120, "n_val": 30, "n_test": 40}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on the embedded scenes, its dictionary barely trained."""
    folder = tmp_path_factory.mktemp("steer")
    sizes = [f"--data.{name}={n}" for name, n in SMALL.items()]
    point = "visual.transformer.resblocks.3"
    main([
        "fit", "--data=Scenes", "--data.source=SceneCLIP", f"--data.source.hook_points=[{point}]",
        "--data.source.positions=first", "--data.batch_size=64", *sizes, "--model.core=TopK",
        "--model.core.d_latent=64", "--model.core.k=6", "--trainer.accelerator=cpu", "--trainer.max_steps=40",
        "--trainer.limit_val_batches=0",
        "--model.lr_warmup_steps=5", "--threads=1", "--trainer.logger=lightning.pytorch.loggers.CSVLogger",
        f"--trainer.logger.save_dir={folder}", "--trainer.logger.name=", "--trainer.logger.version=run",
    ])  # fmt: skip
    return folder / "run"


def test_steering_a_picture_is_shown_beside_what_it_was(run, capsys):
    main(["steer", f"--run={run}", "--concept=colour=red", "--strength=0,30", "--item=3", "--threads=1"])
    said = capsys.readouterr().out
    assert "unsteered" in said
    assert "add 0" in said
    assert "add 30" in said
    lines = [line for line in said.splitlines() if "colour:" in line]
    assert len(lines) == 3
    assert lines[0].split("colour:")[1] == lines[1].split("colour:")[1]
    assert lines[2].split("colour:")[1] != lines[0].split("colour:")[1]
    assert "99th percentile" in said


def test_captions_decide_instead_of_the_prompts_of_the_source(run, capsys, tmp_path):
    from mmsae.miniatures.scenes import Scenes

    Scenes("test", 3)[1]["image"].save(tmp_path / "scene.png")
    main(["steer", f"--run={run}", "--latent", "2", "--edit=ablate", f"--image={tmp_path / 'scene.png'}",
          "--captions=[a red digit,a blue digit]", "--threads=1"])  # fmt: skip
    said = capsys.readouterr().out
    assert said.count("captions: a ") == 2
    assert "ablate" in said


def test_the_bench_writes_a_result_that_the_report_draws_and_goes_on_where_it_stopped(run, capsys):
    words = ["steer", "bench", f"--run={run}", "--label=colour", "--values=[red,blue]", "--strengths=[1,4]",
             "--candidates=1", "--contexts=16", "--others=[position,size]", "--threads=1"]  # fmt: skip
    main(words)
    said = capsys.readouterr().out
    assert "difference of means" in said
    assert "random latent" in said
    path = run / "results" / "Steering-colour.json"
    first = json.loads(path.read_text())
    assert first["numbers"]["latent/score"] > 0
    assert {t["title"].split(",")[0] for t in first["tables"]} >= {"Steering at the best strength", "Examples"}
    assert [p["kind"] for p in first["plots"]].count("heat") == 1
    (ledger,) = (run / "steering").glob("colour-*.jsonl")
    measured = ledger.read_text()
    assert len(measured.splitlines()) == 2 * (1 + 2 * 4)  # two values: unsteered, and two strengths of four arms
    ledger.write_text("\n".join(measured.splitlines()[:5]) + "\n")
    main(words)
    assert sorted(ledger.read_text().splitlines()) == sorted(measured.splitlines())
    assert json.loads(path.read_text()) == first
    main(["report", f"--run={run}"])
    page = (run / "report.html").read_text()
    assert "steering colour succeeds in" in page
    assert "Success against collateral change" in page


def test_a_dictionary_of_another_library_is_steered_with(run, capsys, tmp_path):
    main(["convert", str(run), str(tmp_path / "saelens"), "--to=saelens"])
    said = []
    for sae in (run, tmp_path / "saelens"):
        main(["steer", f"--run={run}", f"--sae={sae}", "--latent=5", "--unit=code", "--strength=9", "--item=3",
              "--threads=1"])  # fmt: skip
        said.append(capsys.readouterr().out.partition("add 9")[2])
    assert said[0] == said[1]
    main(["steer", "bench", f"--run={run}", f"--sae={tmp_path / 'saelens'}", "--label=size", "--strengths=[1,2]",
          "--candidates=1", "--contexts=12", "--threads=1"])  # fmt: skip
    assert "random latent" in capsys.readouterr().out


def test_two_dictionaries_of_one_hook_point_are_no_layers(run, refused):
    said = refused("steer", "bench", f"--run={run}", "--label=size", f"--layers=[{run}]", "--threads=1")
    assert "two dictionaries read 'visual.transformer.resblocks.3'" in said


def test_swapping_and_judging_are_checked_before_long_work(run, capsys, refused):
    main(["steer", "bench", f"--run={run}", "--label=size", "--strengths=[1,2]", "--edit=swap", "--candidates=1",
          "--contexts=12", "--threads=1"])  # fmt: skip
    assert "Steering-size" in capsys.readouterr().out
    said = refused("steer", "bench", f"--run={run}", "--label=size", "--judge=RuleJudge", "--threads=1")
    assert "SceneCLIP writes none: leave --judge out" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--item=0"], "give either --latent=NUMBER or --concept=LABEL=VALUE"),
        (["--latent=1", "--concept=colour=red", "--item=0"], "give either --latent"),
        (["--latent=1"], "give the model something"),
        (["--latent=99", "--unit=code", "--item=0"], "names latent 99, but the dictionary has 64 latents"),
        (["--latent=1", "--unit=code", "--item=4000"], "item=4000 is out of range"),
        (["--latent=1", "--unit=code", "--prompt=red"], "reads no texts alone"),
        (["--latent=1", "--unit=code", "--image=nowhere.png"], "there is no picture 'nowhere.png'"),
        (["--concept=shade=red", "--item=0"], "the data have no label 'shade'; nearest"),
        (["--concept=colour=rod", "--item=0"], "colour has no value 'rod'; nearest: red"),
        (["--latent=1", "--where=here", "--item=0"], "'here' is none of all, generated"),
        (["--latent=1", "--sae=nowhere", "--item=0"], "nowhere"),
    ],
)
def test_mistakes_are_said_in_a_sentence(run, refused, words, said):
    assert said in refused("steer", f"--run={run}", "--threads=1", *words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--label=shade"], "the data have no such label; nearest"),
        (["--label=colour", "--values=[rod]"], "colour has no value 'rod'; nearest: red"),
        (["--label=colour", "--others=[shade]"], "no label 'shade'"),
        (["--label=colour", "--candidates=0"], "candidates=0"),
        (["--label=colour", "--edit=push"], "push"),
        (["--label=colour", "--judge=Rule"], "no Judge is called so; nearest: RuleJudge"),
        (["--label=colour", "--contexts=2"], "contexts=2 is out of range"),
        (["--label=colour", "--strengths=[-1]"], "strength=-1"),
        (["--label=colour", "--strengths=[3]"], "at least two strengths above 0"),
    ],
)
def test_mistakes_of_a_bench_too(run, refused, words, said):
    small = ["--threads=1", "--values=[red]"] if not any(w.startswith("--values") for w in words) else ["--threads=1"]
    assert said in refused("steer", "bench", f"--run={run}", *small, *words)


def test_there_is_no_run():
    with pytest.raises(SystemExit):
        main(["steer", "--run=nowhere", "--latent=1", "--item=0"])


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("positions:1", [1]), ("positions:1-2", [1, 2]), ("positions:2-", [2, 3]), ("~positions:1", [0, 2, 3]),
        ("positions:1- & ~positions:3", [1, 2]), ("box:0,0,0.5,1", [0, 1]), ("prompt", [0, 1]), ("generated", [2, 3]),
    ],
)  # fmt: skip
def test_positions_have_names(text, chosen):
    where = where_of(text)
    found = where(Context((1, 4), torch.device("cpu"), grid=(2, 2) if "box" in text else None, prompt=2))
    assert found.expand(1, 4)[0].nonzero()[:, 0].tolist() == chosen
    assert where_of("all") is None
    with pytest.raises(MmsaeError, match="~all is nowhere"):
        where_of("~all")


def test_help_names_the_bench(capsys):
    with pytest.raises(SystemExit):
        main(["steer", "--help"])
    assert "steer bench" in capsys.readouterr().out
