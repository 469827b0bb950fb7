"""sparsify and dictionary_learning: golden folders of theirs, and our exports, by our readers and by the libraries."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from mmsae import formats
from mmsae.cores import (
    PCA,
    AbsTopK,
    BatchTopK,
    Gated,
    GroupMax,
    JumpReLU,
    Matryoshka,
    MultiTopK,
    PAnneal,
    ReLU,
    SkipTranscoder,
    TopK,
)
from mmsae.errors import MmsaeError
from mmsae.formats import dictionary_learning

GOLDEN = Path(__file__).parent / "golden"
CLASSES = {
    "sparsify_topk": TopK,
    "sparsify_expansion": TopK,
    "sparsify_multi_topk": MultiTopK,
    "sparsify_groupmax": GroupMax,
    "sparsify_transcoder": TopK,
    "sparsify_groupmax_transcoder": GroupMax,
    "sparsify_skip_transcoder": SkipTranscoder,
    "sparsify_skip": SkipTranscoder,
    "dictionary_learning_AutoEncoder": ReLU,
    "dictionary_learning_AutoEncoderNew": ReLU,
    "dictionary_learning_GatedAutoEncoder": Gated,
    "dictionary_learning_AutoEncoderTopK": TopK,
    "dictionary_learning_BatchTopKSAE": BatchTopK,
    "dictionary_learning_MatryoshkaBatchTopKSAE": Matryoshka,
    "dictionary_learning_JumpReluAutoEncoder": JumpReLU,
}
# float32 sums of 8 and 16 terms of size 1, in another order
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
PAIR = {"resid": 8, "target": 8}
X = torch.randn(64, 8, generator=torch.Generator().manual_seed(5)) + 0.3

EXPORTED = {
    "sparsify-TopK": lambda: TopK(8, 16, k=3),
    "sparsify-MultiTopK": lambda: MultiTopK(8, 16, k=3),
    "sparsify-GroupMax": lambda: GroupMax(8, 15, k=3),
    "sparsify-SkipTranscoder": lambda: SkipTranscoder(PAIR, 16, k=3),
    "sparsify-TopK-transcoder": lambda: TopK(PAIR, 16, k=3),
    "sparsify-TopK-narrow": lambda: TopK(8, 6, k=3),
    "dictionary_learning-ReLU": lambda: ReLU(8, 16),
    "dictionary_learning-PAnneal": lambda: PAnneal(8, 16),
    "dictionary_learning-Gated": lambda: Gated(8, 16),
    "dictionary_learning-TopK": lambda: TopK(8, 16, k=3),
    "dictionary_learning-MultiTopK": lambda: MultiTopK(8, 16, k=3),
    "dictionary_learning-JumpReLU": lambda: JumpReLU(8, 16, target_l0=4),
    "dictionary_learning-BatchTopK": lambda: BatchTopK(8, 16, k=3),
    "dictionary_learning-Matryoshka": lambda: Matryoshka(8, 16, k=3, prefixes=(0.25, 0.5, 1)),
}
EXTRA = {"sparsify": "eai-sparsify", "dictionary_learning": "dictionary-learning"}


def randomised(core):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in core.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
        if isinstance(core, JumpReLU):
            core.theta.copy_(torch.rand(core.d_latent, generator=generator))
        if isinstance(core, BatchTopK):
            core.threshold.fill_(0.8)
    return core.eval()


def copied(name, tmp_path):
    shutil.copytree(GOLDEN / name, tmp_path / "sae")
    return tmp_path / "sae"


def test_every_golden_folder_is_expected():
    found = [p.name for p in GOLDEN.iterdir() if p.name.startswith(("sparsify_", "dictionary_learning_"))]
    assert sorted(found) == sorted(CLASSES)


@pytest.mark.parametrize("name", CLASSES)
def test_folder_written_by_the_library_computes_the_same_here(name):
    assert name.startswith(formats.detect(GOLDEN / name))
    core = formats.load(GOLDEN / name)
    expected = load_file(GOLDEN / name / "expected.safetensors")
    codes = core.encode(expected["x"])
    assert type(core) is CLASSES[name]
    assert 0 < expected["codes"].count_nonzero() < expected["codes"].numel()
    assert_close(codes.dense(), expected["codes"], **TOLERANCE)
    assert_close(core.decode(codes), expected["reconstruction"], **TOLERANCE)


@pytest.mark.parametrize("name", EXPORTED)
def test_export_reads_back_equal(name, tmp_path):
    core = randomised(EXPORTED[name]())
    library = name.partition("-")[0]
    again = formats.load(formats.export(core, tmp_path / "sae", library, {"model_name": "toy"}))
    assert formats.detect(tmp_path / "sae") == library
    assert_close(again.encode(X).dense(), core.encode(X).dense(), **TOLERANCE)
    assert_close(again(X), core(X), **TOLERANCE)
    assert "toy" in "".join(file.read_text() for file in (tmp_path / "sae").glob("*.json"))


@pytest.mark.parametrize("name", EXPORTED)
def test_the_library_itself_computes_the_same_from_our_export(name, tmp_path):
    library = name.partition("-")[0]
    module = {"sparsify": "sparsify.utils", "dictionary_learning": "dictionary_learning.utils"}[library]
    pytest.importorskip(module, reason=f"{EXTRA[library]} is not installed: pip install mmsae[benchmark]")
    core = randomised(EXPORTED[name]())
    codes, reconstruction = formats.READ[library].ask(formats.export(core, tmp_path / "sae", library))(X)
    assert codes.count_nonzero() > 0
    assert_close(codes, core.encode(X).dense(), **TOLERANCE)
    assert_close(reconstruction, core(X), **TOLERANCE)


@pytest.mark.parametrize(
    ("make", "library", "sentence"),
    [
        (lambda: PCA(8), "sparsify", "no activation for a PCA; it takes TopK, MultiTopK, GroupMax, SkipTranscoder"),
        (lambda: BatchTopK(8, 16, k=3), "sparsify", "no activation for a BatchTopK"),
        (lambda: AbsTopK(8, 16, k=3), "sparsify", "no activation for a AbsTopK"),
        (lambda: TopK({"resid": 8, "target": 6}, 16, k=3), "sparsify", "one width, not 8 and 6"),
        (lambda: AbsTopK(8, 16, k=3), "dictionary_learning", "no class for a AbsTopK"),
        (lambda: ReLU(PAIR, 16), "dictionary_learning", "no class for a ReLU transcoder"),
        (lambda: BatchTopK(8, 16, k=3), "dictionary_learning", "no inference threshold"),
        (lambda: TopK(8, 16, k=3), "npz", "no format 'npz'; known: saelens, sparsify, dictionary_learning"),
    ],
)
def test_what_a_library_cannot_express_is_refused(make, library, sentence, tmp_path):
    with pytest.raises(MmsaeError, match=sentence):
        formats.export(make(), tmp_path / "sae", library)
    assert not any(tmp_path.iterdir())


# ---- foreign files that need care


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"activation": "relu"}, "activation 'relu'; known here: topk, groupmax"),
        ({"signed": True}, "'signed topk'"),
        ({"d_in": None}, "how wide"),
        ({"num_latents": 12}, r"'W_dec' .* \[16, 8\] instead of \[12, 8\]"),
        ({"skip_connection": True}, "no tensor 'W_skip'"),
        ({"skip_connection": True, "activation": "groupmax"}, "no core here"),
    ],
)
def test_config_of_sparsify_that_cannot_be_used_is_refused_with_a_reason(config, sentence, tmp_path):
    folder = copied("sparsify_topk", tmp_path)
    old = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**old, **config}))
    with pytest.raises(MmsaeError, match=sentence):
        formats.load(folder)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"encoder.bias": None}, "no tensor 'encoder.bias'"),
        ({"decoder.scale": torch.ones(2)}, "a tensor 'decoder.scale', which the dict_class 'BatchTopKSAE' does not"),
        ({"encoder.weight": None}, "no matrix 'encoder.weight'"),
        ({"b_dec": torch.full((8,), torch.inf)}, "'b_dec' .* not finite"),
    ],
)
def test_wrong_tensor_is_named(change, sentence, tmp_path):
    folder = copied("dictionary_learning_BatchTopKSAE", tmp_path)
    state = {**torch.load(folder / "ae.pt", weights_only=True), **change}
    torch.save({name: value for name, value in state.items() if value is not None}, folder / "ae.pt")
    with pytest.raises(MmsaeError, match=sentence):
        formats.load(folder)


def test_unknown_class_of_dictionary_learning_lists_the_known(tmp_path):
    folder = copied("dictionary_learning_BatchTopKSAE", tmp_path)
    (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": "IdentityDict"}}))
    with pytest.raises(MmsaeError, match="'IdentityDict'; known here: AutoEncoder, AutoEncoderNew"):
        formats.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(MmsaeError, match=r"there is no config\.json"):
        formats.load(folder)


class Payload:
    def __reduce__(self):
        return exec, ("raise SystemExit('the pickle ran')",)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    folder = copied("dictionary_learning_BatchTopKSAE", tmp_path)
    torch.save({"encoder.weight": Payload()}, folder / "ae.pt")
    with pytest.raises(MmsaeError, match="could run code when opened"):
        formats.load(folder)
    torch.save(torch.nn.Linear(2, 2), folder / "ae.pt")  # a whole module
    with pytest.raises(MmsaeError, match="save its state dict alone"):
        formats.load(folder)
    (folder / "ae.pt").write_bytes((GOLDEN / "dictionary_learning_BatchTopKSAE" / "ae.pt").read_bytes()[:300])
    with pytest.raises(MmsaeError, match=r"ae\.pt is"):
        formats.load(folder)
    torch.save([1], folder / "ae.pt")
    with pytest.raises(MmsaeError, match="holds a list"):
        formats.load(folder)


@pytest.mark.parametrize("name", [name for name in CLASSES if name.startswith("dictionary_learning")])
def test_backup_from_the_middle_of_a_training_is_folded_as_at_its_end(name, tmp_path):
    folder = copied(name, tmp_path)
    state = torch.load(folder / "ae.pt", weights_only=True)
    torch.save({"step": 5, "ae": state, "optimizer": {}, "config": {}, "norm_factor": 3.0}, folder / "ae.pt")
    core, trained = formats.load(folder), formats.load(GOLDEN / name)
    assert_close(core(3 * X), 3 * trained(X), atol=5e-5, rtol=1e-5)
    assert_close(core.encode(3 * X).dense(), 3 * trained.encode(X).dense(), atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in CLASSES if name.startswith("dictionary_learning")])
def test_checkpoint_finds_its_config_above_or_its_class_by_its_tensors(name, tmp_path):
    folder = copied(name, tmp_path)
    file = folder / "checkpoints" / "ae_1000.pt"
    file.parent.mkdir()
    shutil.move(folder / "ae.pt", file)
    trained = formats.load(GOLDEN / name)
    assert formats.detect(file) == "dictionary_learning"
    assert_close(formats.load(file)(X), trained(X), **TOLERANCE)
    assert dictionary_learning.about(file)["model_name"] == "toy"
    trainer = json.loads((folder / "config.json").read_text())["trainer"]
    (folder / "config.json").unlink()
    if CLASSES[name] in (TopK, BatchTopK):
        with pytest.raises(MmsaeError, match=r"of AutoEncoderTopK or BatchTopKSAE, and there is no config\.json"):
            formats.load(file)
    else:
        assert type(formats.load(file)) is CLASSES[name]
        assert_close(formats.load(file)(X), trained(X), **TOLERANCE)
    state = torch.load(file, weights_only=True)
    torch.save(
        {"step": 5, "ae": state, "optimizer": {}, "config": trainer, "norm_factor": None}, file
    )  # says it itself
    assert_close(formats.load(file)(X), trained(X), **TOLERANCE)
    torch.save({"weight": torch.ones(2, 2)}, file)
    with pytest.raises(MmsaeError, match=r"of no class known here \(weight\)"):
        formats.load(file)


def test_threshold_that_was_never_measured_stays_unset(tmp_path):
    folder = copied("dictionary_learning_BatchTopKSAE", tmp_path)
    state = torch.load(folder / "ae.pt", weights_only=True)
    torch.save({**state, "threshold": torch.tensor(-1.0)}, folder / "ae.pt")
    with pytest.raises(MmsaeError, match="no inference threshold"):
        formats.load(folder).encode(X)


def test_folder_of_many_hook_points_names_them(tmp_path):
    for hook in ("layers.1", "layers.2.mlp"):
        shutil.copytree(GOLDEN / "sparsify_topk", tmp_path / "run" / hook)
    with pytest.raises(MmsaeError, match=r"one of its folders: layers\.1, layers\.2\.mlp"):
        formats.detect(tmp_path / "run")
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(MmsaeError, match="no format that is known here; known: saelens, sparsify"):
        formats.detect(tmp_path / "a.safetensors")
    with pytest.raises(MmsaeError, match="does not exist"):
        formats.detect(tmp_path / "nix")
