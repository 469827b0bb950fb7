import json
from pathlib import Path

import pytest
import torch

from mmsae.cli.main import main
from mmsae.cli.similarity import run
from mmsae.errors import MmsaeError
from mmsae.metrics.similarity import linear_cka
from mmsae.spec import ACTS
from mmsae.store import Store, Writer

ITDA = ["--model.core=ITDA", "--model.core.d_latent=200", "--model.core.k=4", "--model.core.threshold=0.3"]
NAMED = "--data.columns=[sample_id]"


def numbers(out="similarity"):
    return json.loads((Path(out) / "results" / "DictionarySimilarity.json").read_text())["numbers"]


def test_dictionaries_grown_from_the_same_rows_are_the_same(fit, capsys):
    runs = [fit(NAMED, core=ITDA) for _ in range(2)]
    capsys.readouterr()
    run(["similarity", f"--models=[[{runs[0]}],[{runs[1]}]]", "--n_rows=200"])
    said = capsys.readouterr().out
    assert "Jaccard" in said
    assert "next:    mmsae report --run similarity" in said
    assert numbers()["Jaccard"] == 1
    assert numbers()["linear CKA"] == pytest.approx(1, abs=1e-6)
    main(["report", "--run=similarity", "--title=Layers of 2 models"])
    assert "Jaccard" in Path("similarity/report.html").read_text()


def test_dictionaries_of_another_seed_are_refused(fit):
    runs = [fit(NAMED, f"--data.seed={seed}", core=ITDA) for seed in (0, 1)]
    with pytest.raises(MmsaeError, match=r"saw their rows in different orders \(seed differ\)"):
        run(["similarity", f"--models=[[{runs[0]}],[{runs[1]}]]"])
    for folder in runs:  # also where nothing but the dictionaries is left
        (folder / "config.yaml").unlink()
    with pytest.raises(MmsaeError, match="saw their rows in different orders: grow them"):
        run(["similarity", f"--models=[[{runs[0]}/sae],[{runs[1]}/sae]]"])


def test_streams_of_stores_are_layers(tmp_path):
    turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))[0]
    for name, by in (("one", torch.eye(8)), ("two", turn)):
        writer = Writer(tmp_path / name / "test", {}, "float32", rows_per_shard=100)
        writer.resume()
        g = torch.Generator().manual_seed(1)
        acts = {f"blocks.{i}": torch.randn(150, 8, generator=g) @ by for i in range(3)}
        writer.add({ACTS: acts, "sample_id": torch.arange(150)})
        writer.close()
        writer.finish({"class": "Toy"}, {"class": "Toy"}, {})
    run(["similarity", f"--models=[[{tmp_path / 'one'}],[{tmp_path / 'two'}/test]]", "--n_rows=120", "--out=found"])
    found = numbers("found")
    assert found["linear CKA/matched"] == found["SVCCA/matched"] == 1
    x = Store(tmp_path / "one" / "test").read([(0, 0, 100), (1, 0, 20)])[ACTS]
    want = sum(linear_cka(x[f"blocks.{i}"], x[f"blocks.{j}"]) for i in range(3) for j in range(3) if i != j) / 6
    assert found["linear CKA/other"] == pytest.approx(want, abs=1e-5)
