import json

import pytest
import torch
from tiny import live

from mmsae.analyses import Analysis, CrossModal, Plot, Result, Table
from mmsae.analyses.base import Result as Base
from mmsae.errors import MmsaeError

FULL = Result(
    name="Toy",
    title="a finding, 50 % – ünïcode",
    numbers={"a/b": 0.5, "c": float("nan")},
    tables=[Table("t", ["", "x"], [["row", 1.5], ["none", None], ["text", "1 to 2"], ["whole", 3]])],
    plots=[Plot("p", "steps", "", [{"label": "l", "x": [1, 2], "y": [0.1, 0.2]}], kind="bars", log="y")],
    latents=[{"id": 3, "histogram": {"edges": [0.0, 1.0], "counts": [4]}, "factor": None}],
    media=[{"kind": "text", "tokens": ["a", " b"]}],
    settings={"split": "test", "headline": [{"label": "l", "value": "1", "note": ""}]},
)


def test_a_result_comes_back_from_its_file(tmp_path):
    path = FULL.save(tmp_path / "results")
    assert path.name == "Toy.json"
    again = Result.load(path)
    assert again.numbers.pop("c") != again.numbers.get("c")  # NaN stays NaN
    assert again == Base(**{**FULL.__dict__, "numbers": {"a/b": 0.5}})
    assert isinstance(again.tables[0], Table)
    assert isinstance(again.plots[0], Plot)


def test_saving_again_replaces_and_leaves_nothing_behind(tmp_path):
    FULL.save(tmp_path)
    Result("Toy", title="new").save(tmp_path)
    assert Result.load(tmp_path / "Toy.json").title == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["Toy.json"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"name": "x"}', '{"name": "x", "tables": [1], "plots": []}'])
def test_a_damaged_file_is_named(content, tmp_path):
    (tmp_path / "Toy.json").write_text(content)
    with pytest.raises(MmsaeError, match=r"Toy\.json is not a result .*; run mmsae evaluate again"):
        Result.load(tmp_path / "Toy.json")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(MmsaeError, match="is not a result"):
        Result.load(tmp_path / "no.json")


def test_results_are_plain_json(tmp_path):
    raw = json.loads(FULL.save(tmp_path).read_text())
    assert set(raw) == set(FULL.__dict__)


def settings():
    from mmsae.cores import TopK
    from mmsae.latents import LatentStore

    torch.manual_seed(0)
    data = live(20)
    core = TopK({"0": 8}, 16, k=3).eval()
    return core, LatentStore.build(core, data.rows("test")), data


OURS = [c for c in Analysis.__subclasses__() if c.__module__.startswith("mmsae.") and c is not CrossModal]
"""CrossModal asks for pairs, which these data have not; `test_cross_modal.py` makes the same checks."""


@pytest.mark.parametrize("cls", OURS)
def test_every_analysis_saves_what_it_gives(cls, tmp_path):
    """Over all analyses: default settings, data without labels, numbers that JSON can hold."""
    result = cls().run(*settings())
    assert result.name == cls.__name__
    assert result.title
    assert all(type(v) is float for v in result.numbers.values())
    assert Result.load(result.save(tmp_path)) == result


@pytest.mark.parametrize("cls", OURS)
def test_every_analysis_gives_the_same_twice_and_changes_nothing(cls):
    core, latents, data = settings()
    before = {k: v.clone() for k, v in core.state_dict().items()}
    assert cls().run(core, latents, data) == cls().run(core, latents, data)
    assert all(torch.equal(before[k], v) for k, v in core.state_dict().items())
    assert not core.training
