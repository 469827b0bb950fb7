import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from mmsae import artifact
from mmsae.cores import PCA, BatchTopK, ReLU
from mmsae.errors import MmsaeError

GOLDEN = sorted((Path(__file__).parent / "golden").glob("format_*"))
X = torch.linspace(-2, 2, 40).reshape(10, 4)


def golden_core():
    """The core behind tests/golden: values that any machine makes alike."""
    core = BatchTopK(4, 6, k=2)
    with torch.no_grad():
        core.W_enc.copy_((torch.arange(24).reshape(4, 6) / 8 - 1).T)
        core.W_dec.copy_(torch.arange(24).reshape(6, 4) / 8 - 1.5)
        core.b_enc.copy_(torch.arange(6) / 4)
        core.b_dec.copy_(torch.arange(4) / 2)
        core.threshold.fill_(0.375)
        core.rows_seen.fill_(123)
    return core.eval()


@pytest.fixture
def saved(tmp_path):
    return artifact.save(golden_core(), tmp_path / "run" / "sae", training={"rows": 123}, metrics={"fvu": 0.1})


def test_save_and_load_give_the_same_codes(saved):
    core, again = golden_core(), artifact.load(saved)
    assert type(again) is BatchTopK
    assert not again.training
    assert not any(p.requires_grad for p in again.parameters())
    assert_close(again.encode(X).dense(), core.encode(X).dense(), rtol=0, atol=0)
    assert again.state_dict().keys() == core.state_dict().keys()
    assert again.threshold.dtype == torch.float64
    assert int(again.rows_seen) == 123


def test_run_folder_sae_folder_and_string_are_all_accepted(saved):
    for path in (saved, saved.parent, str(saved.parent)):
        assert artifact.find(path) == saved
        assert artifact.load(path).config == golden_core().config


def test_description_is_kept(saved):
    description = artifact.describe(saved)
    assert description["format"] == artifact.FORMAT
    assert description["core"] == "BatchTopK"
    assert description["training"] == {"rows": 123}
    assert description["metrics"] == {"fvu": 0.1}


def test_nothing_is_pickled(saved):
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "sae.safetensors"]
    with safe_open(saved / "sae.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(golden_core().state_dict())
    assert os.stat(saved).st_mode & 0o055 == 0o055  # others may read it


def test_a_core_with_statistics_in_float64_keeps_them(tmp_path):
    core = PCA(4)
    core.products.normal_()
    assert_close(artifact.load(artifact.save(core, tmp_path / "sae")).get_buffer("products"), core.products)


# ---- replacing


def test_saving_again_replaces_the_old_artifact(saved):
    artifact.save(ReLU(4, 6), saved)
    assert type(artifact.load(saved)) is ReLU
    assert [path.name for path in saved.parent.iterdir()] == ["sae"]


@pytest.mark.parametrize("failing", ["write", "move the old away", "move the new in"])
def test_a_failure_midway_leaves_the_old_artifact(saved, monkeypatch, failing):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    if failing == "write":
        monkeypatch.setattr(Path, "write_bytes", broken)
    else:
        calls, replace, fails_at = [], os.replace, ["move the old away", "move the new in"].index(failing)

        def fail_once(source, target):
            calls.append(target)
            if len(calls) == fails_at + 1:
                raise OSError("disk full")
            replace(source, target)

        monkeypatch.setattr(os, "replace", fail_once)
    with pytest.raises(OSError, match="disk full"):
        artifact.save(ReLU(4, 6), saved)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == ["sae"]
    assert type(artifact.load(saved)) is BatchTopK


def broken(*args):
    raise OSError("disk full")


def test_description_that_is_no_json_leaves_the_old_artifact(saved):
    with pytest.raises(TypeError):
        artifact.save(ReLU(4, 6), saved, metrics={"fvu": torch.ones(1)})
    assert type(artifact.load(saved)) is BatchTopK
    assert [path.name for path in saved.parent.iterdir()] == ["sae"]


def test_foreign_folders_and_files_are_not_replaced(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("thesis", "file"):
        with pytest.raises(MmsaeError, match="holds something else"):
            artifact.save(ReLU(4, 6), tmp_path / name)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert type(artifact.load(artifact.save(ReLU(4, 6), tmp_path / "empty"))) is ReLU


# ---- what cannot be loaded says why


def rewrite(folder, **changes):
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"format": 99}, "format 99, newer than the 2 known here: update mmsae"),
        ({"format": 0}, "not a dictionary of mmsae"),
        ({"format": "one"}, "not a dictionary of mmsae"),
        ({"core": None}, "not a dictionary of mmsae"),
        ({"core": "BatchTopKK"}, "'BatchTopKK' is no imported SAECore; nearest: .*BatchTopK"),
        ({"core": "os.system"}, "no imported SAECore"),
        ({"core": "ReLU"}, "does not fit ReLU"),
        ({"config": {"spec": {"x": 4}, "d_latent": 7, "k": 2}}, "does not fit BatchTopK"),
        ({"config": {"spec": {"x": 4}, "d_latent": 6, "k": 9}}, "k=9 is larger than d_latent=6"),
        ({"config": [1]}, "does not fit|not a dictionary"),
    ],
)
def test_config_that_cannot_be_used_is_refused(saved, changes, sentence):
    rewrite(saved, **changes)
    with pytest.raises(MmsaeError, match=sentence):
        artifact.load(saved)


def test_damaged_weights_are_found(saved):
    file = saved / "sae.safetensors"
    good = file.read_bytes()
    for bad in (good[:-1], good[:-1] + bytes([good[-1] ^ 1]), b""):
        file.write_bytes(bad)
        with pytest.raises(MmsaeError, match=r"sae\.safetensors is damaged: its checksum differs"):
            artifact.load(saved)


def test_missing_files_are_named(saved):
    (saved / "sae.safetensors").unlink()
    with pytest.raises(MmsaeError, match=r"holds no trained dictionary \(config.json and sae.safetensors\)"):
        artifact.load(saved)
    shutil.rmtree(saved)
    with pytest.raises(MmsaeError, match="holds no trained dictionary"):
        artifact.load(saved.parent)
    with pytest.raises(MmsaeError, match="does not exist"):
        artifact.load(saved.parent / "nowhere")
    with pytest.raises(MmsaeError, match="does not exist"):
        artifact.load("nowhere")


def test_config_that_is_no_json_is_refused(saved):
    for text in ("{", "null", "[]"):
        (saved / "config.json").write_text(text)
        with pytest.raises(MmsaeError, match=r"config\.json is not a dictionary of mmsae"):
            artifact.load(saved)


# ---- older formats


def test_every_format_has_a_golden_file():
    assert [folder.name for folder in GOLDEN] == [f"format_{n}" for n in range(1, artifact.FORMAT + 1)]


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: folder.name)
def test_golden_artifact_still_loads(folder):
    core, expected = artifact.load(folder), load_file(folder / "expected.safetensors")
    codes = core.encode(expected["x"])
    assert_close(codes.dense(), expected["codes"])
    assert_close(core.decode(codes), expected["reconstruction"])


def write_golden():
    """Once per format, in tests/: `python -c "from test_artifact import write_golden; write_golden()"`."""
    folder = Path(__file__).parent / "golden" / f"format_{artifact.FORMAT}"
    core = golden_core()
    artifact.save(core, folder, training={"rows": 123})
    codes = core.encode(X)
    expected = {"x": X, "codes": codes.dense(), "reconstruction": core.decode(codes)}
    save_file({name: t.detach().contiguous() for name, t in expected.items()}, folder / "expected.safetensors")
