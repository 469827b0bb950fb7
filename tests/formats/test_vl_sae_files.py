"""Files of github.com/ssfgunner/VL-SAE, against its formulas written once more with dense matrices."""

import pytest
import torch
from torch.testing import assert_close

from mmsae import artifact, formats
from mmsae.cli.main import main
from mmsae.cores import VLSAE, AlignmentAutoencoder
from mmsae.errors import MmsaeError

D, M, K, N = 6, 48, 5, 40
G = torch.Generator().manual_seed(0)
X = {s: 2 * torch.randn(N, D, generator=G) + 0.5 for s in ("image", "text")}
OURS = {"image": "vision", "text": "text"}


def random(*shape):
    return 0.5 * torch.randn(*shape, generator=G)


def linear(name, n_out, n_in):
    return {f"{name}.weight": random(n_out, n_in), f"{name}.bias": random(n_out)}


FILES = {
    "openclip_ViT-B-32_VL_SAE_5_8_best.pth": {
        "encoder": random(M, D), **linear("vision_decoder", D, M), **linear("text_decoder", D, M),
    },
    "openclip_ViT-B-32_SAE_D_5_8_best.pth": {
        **linear("v_encoder", M, D), **linear("t_encoder", M, D),
        **linear("vision_decoder.0", D, M), **linear("text_decoder.0", D, M),
    },
    "openclip_ViT-B-32_SAE_V_5_8_0.123_final.pth": {**linear("encoder", M, D), **linear("decoder.0", D, M)},
    "qwen_vlsae_layer26_5_8_best.pth": {
        "encoder": random(M, D), **linear("vision_decoder", D, M), **linear("text_decoder", D, M),
    },
}  # fmt: skip


def theirs(state, stream):
    """Codes and reconstruction of a stream, by their formulas."""
    x, name = X[stream], OURS[stream]
    if "encoder" in state:
        unit = torch.nn.functional.normalize
        pre = 2 - torch.cdist(unit(x, dim=1).double(), unit(state["encoder"], dim=1).double()).float()
    else:
        own = f"{name[0]}_encoder" if "v_encoder.weight" in state else "encoder"
        pre = (x @ state[f"{own}.weight"].T + state[f"{own}.bias"]).relu()
    best = pre.abs().topk(K, dim=1).indices
    codes = torch.zeros_like(pre).scatter(1, best, pre.gather(1, best))
    decoder = next(n for n in (f"{name}_decoder", f"{name}_decoder.0", "decoder.0") if f"{n}.weight" in state)
    return codes, codes @ state[f"{decoder}.weight"].T + state[f"{decoder}.bias"]


@pytest.mark.parametrize("file", FILES)
def test_a_dictionary_computes_here_what_it_computes_there(file, tmp_path):
    torch.save(FILES[file], tmp_path / file)
    assert formats.detect(tmp_path / file) == "vl_sae"
    core = formats.load(tmp_path / file)
    assert isinstance(core, VLSAE)
    assert core.spec.streams == {"image": D, "text": D}
    assert core.k == K
    for stream, x in X.items():
        codes, out = theirs(FILES[file], stream)
        found = core.encode_stream(stream, x)
        assert_close(found.dense(), codes, atol=1e-5, rtol=1e-5)
        assert_close(core.decode_stream(stream, found), out, atol=1e-5, rtol=1e-5)


def auxiliary():
    parts = ("vision_projection", 8, 6), ("text_projection", 8, 4), ("vision_decoder", 6, 8), ("text_decoder", 4, 8)
    return {key: value for part in parts for key, value in linear(*part).items()}


def test_the_alignment_autoencoder_is_read_too(tmp_path):
    state = auxiliary()
    torch.save(state, tmp_path / "llava_aux_best.pt")
    core = formats.load(tmp_path / "llava_aux_best.pt")
    assert isinstance(core, AlignmentAutoencoder)
    assert core.spec.streams == {"image": 6, "text": 4}
    assert not core.normalize_contrastive
    x = torch.randn(9, 4)
    e = core.encode_stream("text", x)
    assert_close(e.values, x @ state["text_projection.weight"].T + state["text_projection.bias"])
    out = e.values @ state["text_decoder.weight"].T + state["text_decoder.bias"]
    assert_close(core.decode_stream("text", e), out)


def test_convert_writes_ours_and_compares(tmp_path, capsys):
    file = tmp_path / next(iter(FILES))
    torch.save(FILES[file.name], file)
    main(["convert", str(file), str(tmp_path / "sae"), "--to=mmsae", "--check"])
    assert "largest difference of codes 0.0e+00" in capsys.readouterr().out
    again = artifact.load(tmp_path / "sae")
    assert_close(again(X), formats.load(file)(X), rtol=0, atol=0)
    with pytest.raises(MmsaeError, match="VLSAE"):
        formats.export(again, tmp_path / "theirs", "saelens")


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("vlsae.pth", {}, "does not say how many latents fire"),
        ("x_99_8_best.pth", {}, "99 of its 48 latents fire"),
        ("x_5_8_best.pth", {"text_decoder.bias": torch.zeros(7)}, r"text_decoder.bias.* has the shape \[7\]"),
        ("x_5_8_best.pth", {"encoder": torch.full((M, D), torch.nan)}, "not finite"),
    ],
)
def test_what_is_wrong_is_said(name, change, says, tmp_path):
    torch.save({**FILES["openclip_ViT-B-32_VL_SAE_5_8_best.pth"], **change}, tmp_path / name)
    with pytest.raises(MmsaeError, match=says):
        formats.load(tmp_path / name)


def test_other_objects_than_tensors_are_refused(tmp_path):
    torch.save({"encoder": pytest.approx(1)}, tmp_path / "x_5_8_best.pth")
    with pytest.raises(MmsaeError, match="could run code when opened"):
        formats.load(tmp_path / "x_5_8_best.pth", "vl_sae")
