import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from mmsae.cores import (
    PCA,
    AbsTopK,
    BatchTopK,
    Gated,
    JumpReLU,
    JumpReLUSkipTranscoder,
    MatchingPursuit,
    Matryoshka,
    MultiTopK,
    PAnneal,
    ReLU,
    SkipTranscoder,
    TopK,
)
from mmsae.cores.base import Affine
from mmsae.errors import MmsaeError
from mmsae.formats import saelens

GOLDEN = sorted(Path(__file__).parent.glob("golden/saelens_*"))
CLASSES = {
    "abstopk": AbsTopK,
    "abstopk_rescale": AbsTopK,
    "batchtopk": BatchTopK,
    "gated": Gated,
    "gated_training": Gated,
    "gated_uncentred": Gated,
    "jumprelu": JumpReLU,
    "jumprelu_skip_transcoder": JumpReLUSkipTranscoder,
    "jumprelu_transcoder": JumpReLU,
    "jumprelu_uncentred": JumpReLU,
    "matching_pursuit": MatchingPursuit,
    "matching_pursuit_all": MatchingPursuit,
    "matching_pursuit_default": MatchingPursuit,
    "matching_pursuit_uncentred": MatchingPursuit,
    "matryoshka": Matryoshka,
    "skip_transcoder": JumpReLUSkipTranscoder,
    "standard": ReLU,
    "standard_uncentred": ReLU,
    "topk": TopK,
    "topk_rescale": TopK,
    "topk_training": TopK,
    "topk_uncentred": TopK,
    "transcoder": ReLU,
}
# float32 sums of 8 and 16 terms of size 1, in another order
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
PAIR = {"resid": 8, "target": 6}
X = torch.randn(64, 8, generator=torch.Generator().manual_seed(5)) + 0.3


def randomised(core):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in core.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
        if isinstance(core, JumpReLU):
            core.theta.copy_(torch.rand(core.d_latent, generator=generator))
        if isinstance(core, BatchTopK):
            core.threshold.fill_(0.8)
        if isinstance(core, MatchingPursuit):
            core.W_dec /= core.W_dec.norm(dim=-1, keepdim=True)
            core.b_dec.copy_(torch.randn(core.spec.d_in, generator=generator))
    return core.eval()


EXPORTED = {
    "ReLU": lambda: ReLU(8, 16),
    "TopK": lambda: TopK(8, 16, k=3),
    "JumpReLU": lambda: JumpReLU(8, 16, target_l0=4),
    "BatchTopK": lambda: BatchTopK(8, 16, k=3),
    "Matryoshka": lambda: Matryoshka(8, 16, k=3, prefixes=(0.25, 1)),
    "PAnneal": lambda: PAnneal(8, 16),
    "MultiTopK": lambda: MultiTopK(8, 16, k=3),
    "AbsTopK": lambda: AbsTopK(8, 16, k=3),
    "Gated": lambda: Gated(8, 16),
    "MatchingPursuit": lambda: MatchingPursuit(8, 16, k=5),
    "MatchingPursuit-tolerance": lambda: MatchingPursuit(8, 16, k=9, tolerance=0.5),
    "JumpReLU-skip": lambda: JumpReLUSkipTranscoder(PAIR, 16, target_l0=4),
    "ReLU-transcoder": lambda: ReLU(PAIR, 16),
    "JumpReLU-transcoder": lambda: JumpReLU(PAIR, 16, target_l0=4),
    "BatchTopK-transcoder": lambda: BatchTopK(PAIR, 16, k=3),
}


def unit(core):
    """What SAELens multiplies the codes by: for BatchTopK the norm of the rows."""
    return core.W_dec.norm(dim=-1) if isinstance(core, BatchTopK) else torch.ones(core.d_latent)


def test_every_golden_folder_is_expected():
    assert [folder.name.removeprefix("saelens_") for folder in GOLDEN] == sorted(CLASSES)


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: folder.name)
def test_folder_written_by_saelens_computes_the_same_here(folder):
    core = saelens.load(folder)
    expected = load_file(folder / "expected.safetensors")
    codes = core.encode(expected["x"])
    assert type(core) is CLASSES[folder.name.removeprefix("saelens_")]
    assert 0 < expected["codes"].count_nonzero() < expected["codes"].numel()
    assert_close(codes.dense(), expected["codes"], **TOLERANCE)
    assert_close(core.decode(codes), expected["reconstruction"], **TOLERANCE)
    assert saelens.read_config(folder)["metadata"]["hook_name"] == "blocks.0.hook_resid_pre"


@pytest.mark.parametrize("make", EXPORTED.values(), ids=EXPORTED)
def test_export_reads_back_equal(make, tmp_path):
    core = randomised(make())
    again = saelens.load(saelens.export(core, tmp_path / "sae", {"model_name": "toy"}))
    assert_close(again.encode(X).dense(), core.encode(X).dense() * unit(core), **TOLERANCE)
    assert_close(again(X), core(X), **TOLERANCE)
    assert saelens.read_config(tmp_path / "sae")["metadata"]["model_name"] == "toy"
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["cfg.json", "sae_weights.safetensors"]


@pytest.mark.parametrize("make", EXPORTED.values(), ids=EXPORTED)
def test_saelens_itself_computes_the_same_from_our_export(make, tmp_path):
    sae_lens = pytest.importorskip("sae_lens", reason="sae-lens is not installed: pip install mmsae[formats]")
    core = randomised(make())
    theirs = sae_lens.SAE.load_from_disk(saelens.export(core, tmp_path / "sae", {"hook_name": "blocks.3"}))
    assert_close(theirs.encode(X), core.encode(X).dense() * unit(core), **TOLERANCE)
    assert_close(theirs(X), core(X), **TOLERANCE)  # its decode leaves out a skip connection
    assert theirs.cfg.metadata.hook_name == "blocks.3"


def test_batchtopk_is_exported_with_unit_rows_after_whitening(tmp_path):
    core = randomised(BatchTopK(8, 16, k=3))
    matrix = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    core.fold({"x": Affine(torch.ones(8), matrix @ matrix.T + torch.eye(8))})
    again = saelens.load(saelens.export(core, tmp_path / "sae"))
    assert_close(again.W_dec.norm(dim=-1), torch.ones(16))
    assert_close(again.encode(X).l0(), core.encode(X).l0())
    assert_close(again(X), core(X), atol=1e-4, rtol=1e-4)  # the inverse of the matrix has entries of size 10


def test_what_saelens_cannot_express_is_refused(tmp_path):
    with pytest.raises(MmsaeError, match="no architecture for a PCA"):
        saelens.export(PCA(8), tmp_path / "sae")
    with pytest.raises(MmsaeError, match="TopK transcoder"):
        saelens.export(TopK(PAIR, 16, k=3), tmp_path / "sae")
    with pytest.raises(MmsaeError, match="SkipTranscoder transcoder"):
        saelens.export(SkipTranscoder(PAIR, 16, k=3), tmp_path / "sae")
    with pytest.raises(MmsaeError, match="Gated transcoder"):
        saelens.export(Gated(PAIR, 16), tmp_path / "sae")
    whitened = MatchingPursuit(8, 16, k=3)
    whitened.fold({"x": Affine(torch.ones(8), 2 * torch.eye(8))})
    with pytest.raises(MmsaeError, match="whitened units"):
        saelens.export(whitened, tmp_path / "sae")
    with pytest.raises(MmsaeError, match="no inference threshold"):
        saelens.export(BatchTopK(8, 16, k=3), tmp_path / "sae")
    assert not any(tmp_path.iterdir())


def test_export_does_not_replace_a_foreign_folder(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(MmsaeError, match="something else"):
        saelens.export(randomised(ReLU(8, 16)), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


# ---- foreign files that need care


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(next(f for f in GOLDEN if f.name == "saelens_jumprelu"), tmp_path / "sae")
    return tmp_path / "sae"


def rewrite(folder, config=None, tensors=None):
    if config:
        old = json.loads((folder / "cfg.json").read_text())
        (folder / "cfg.json").write_text(json.dumps({**old, **config}))
    if tensors:
        old = load_file(folder / "sae_weights.safetensors")
        new = {name: value for name, value in {**old, **tensors}.items() if value is not None}
        save_file(new, folder / "sae_weights.safetensors")


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"architecture": "temporal"}, "known here: standard, topk, abstopk, jumprelu"),
        ({"architecture": "gated"}, "'b_enc', which the architecture 'gated' does not know"),
        ({"architecture": "jumprelu_skip_transcoder", "d_out": 8}, "no tensor 'W_skip'"),
        ({"normalize_activations": "expected_average_only_in"}, "fold_activation_norm_scaling_factor"),
        ({"normalize_activations": "covariance_whitening"}, "fold_activation_whitening"),
        ({"normalize_activations": "layer_norm"}, r"each row.* take \(x - its mean\)"),
        ({"normalize_activations": "constant_norm_rescale"}, "root of d_in over its norm"),
        ({"d_sae": None}, "how wide"),
        ({"d_sae": 12}, r"'W_dec' .* \[16, 8\] instead of \[12, 8\]"),
        ({"architecture": "standard"}, "'threshold', which the architecture 'standard' does not know"),
        ({"metadata": 3}, "no config of SAELens"),
    ],
)
def test_config_that_cannot_be_used_is_refused_with_a_reason(folder, config, sentence):
    rewrite(folder, config)
    with pytest.raises(MmsaeError, match=sentence):
        saelens.load(folder)


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({"b_enc": None}, "no tensor 'b_enc'"),
        ({"threshold": torch.zeros(3)}, r"'threshold' .* \[3\] instead of \[16\]"),
        ({"W_enc": torch.full((8, 16), torch.nan)}, "'W_enc' .* not finite"),
        ({"scaling_factor": torch.full((16,), 2.0)}, "scaling_factor other than 1"),
    ],
)
def test_wrong_tensor_is_named(folder, tensors, sentence):
    rewrite(folder, tensors=tensors)
    with pytest.raises(MmsaeError, match=sentence):
        saelens.load(folder)


def test_missing_or_cut_files_are_named(folder):
    weights = folder / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(MmsaeError, match=r"sae_weights\.safetensors is missing or damaged"):
        saelens.load(folder)
    weights.unlink()
    with pytest.raises(MmsaeError, match="missing or damaged"):
        saelens.load(folder)
    (folder / "cfg.json").write_text("{")
    with pytest.raises(MmsaeError, match="no config of SAELens"):
        saelens.load(folder)
    (folder / "cfg.json").unlink()
    with pytest.raises(MmsaeError, match=r"there is no cfg\.json"):
        saelens.load(folder)


def test_where_a_pursuit_ends_is_kept_and_a_number_of_steps_is_a_number(tmp_path):
    for repeats in (True, False):
        core = randomised(MatchingPursuit(8, 16, k=5, repeats=repeats))
        assert saelens.load(saelens.export(core, tmp_path / "sae")).repeats == repeats
    rewrite(tmp_path / "sae", {"max_iterations": "many"})
    with pytest.raises(MmsaeError, match="max_iterations=many, where a whole number is needed"):
        saelens.load(tmp_path / "sae")


def test_tolerance_of_a_pursuit_comes_back_and_holds_before_the_first_step(tmp_path):
    core = randomised(MatchingPursuit(8, 16, k=5, tolerance=0.5))
    again = saelens.load(saelens.export(core, tmp_path / "sae"))
    near = core.b_dec + 0.01 * X
    assert float(again.stop) == 0.5
    assert again.encode(near).l0().max() == core.encode(near).l0().max() == 0  # SAELens takes one step there


def test_flat_config_of_sae_lens_5_is_rewritten(tmp_path):
    golden = next(f for f in GOLDEN if f.name == "saelens_topk")
    shutil.copytree(golden, tmp_path / "sae")
    flat = {
        "architecture": "standard",  # so it stood in the file; the activation function tells that it is a TopK
        "d_in": 8,
        "d_sae": 16,
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 3},
        "hook_point": "blocks.1.hook_resid_pre",
        "model_name": "gpt2",
        "normalize_activations": False,
        "finetuning_scaling_factor": False,
    }
    (tmp_path / "sae" / "cfg.json").write_text(json.dumps({**flat, "normalize_activations": "none"}))
    rewrite(tmp_path / "sae", tensors={"scaling_factor": torch.ones(16)})
    expected = load_file(golden / "expected.safetensors")
    core = saelens.load(tmp_path / "sae")
    assert (type(core), core.k) == (TopK, 3)
    assert_close(core.encode(expected["x"]).dense(), expected["codes"], **TOLERANCE)
    assert saelens.read_config(tmp_path / "sae")["metadata"] == {
        "model_name": "gpt2",
        "hook_name": "blocks.1.hook_resid_pre",
    }
    (tmp_path / "sae" / "cfg.json").write_text(json.dumps({**flat, "normalize_activations": True}))
    with pytest.raises(MmsaeError, match="expected_average_only_in"):
        saelens.load(tmp_path / "sae")
    (tmp_path / "sae" / "cfg.json").write_text(json.dumps({**flat, "activation_fn_str": "tanh-relu"}))
    with pytest.raises(MmsaeError, match="tanh-relu"):
        saelens.load(tmp_path / "sae")


def test_log_threshold_of_older_training_checkpoints(folder):
    threshold = load_file(folder / "sae_weights.safetensors")["threshold"].abs() + 0.01
    rewrite(folder, tensors={"threshold": None, "log_threshold": threshold.log()})
    assert_close(saelens.load(folder).theta.data, threshold)


def test_batchtopk_that_never_measured_its_threshold_stays_unset(tmp_path):
    shutil.copytree(next(f for f in GOLDEN if f.name == "saelens_batchtopk"), tmp_path / "sae")
    rewrite(tmp_path / "sae", tensors={"topk_threshold": torch.zeros((), dtype=torch.float64)})
    core = saelens.load(tmp_path / "sae")
    with pytest.raises(MmsaeError, match="no inference threshold"):
        core.encode(X)
    rewrite(tmp_path / "sae", {"k": 2.5})
    with pytest.raises(MmsaeError, match="save_inference_model"):
        saelens.load(tmp_path / "sae")
