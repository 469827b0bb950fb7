import pytest
import torch
from torch.testing import assert_close

from mmsae.codes import Codes
from mmsae.cores import VLSAE, AlignmentAutoencoder, GroupSparse
from mmsae.cores.base import Affine
from mmsae.errors import MmsaeError
from mmsae.latents import LatentStore
from mmsae.spec import ACTS, MODALITIES, ActivationSpec

SPEC, M, D = {"image": 6, "text": 6, "audio": 6}, 20, 6
MAKERS = {
    "GroupSparse": lambda: GroupSparse(SPEC, M, k=4),
    "VLSAE": lambda: VLSAE(SPEC, M, k=4),
    "AlignmentAutoencoder": lambda: AlignmentAutoencoder({"image": 6, "text": 4, "audio": 3}, M),
}


def acts(core, n=10, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {s: torch.randn(n, w, generator=g) + 0.3 for s, w in core.spec.streams.items()}


@pytest.fixture(params=MAKERS, ids=str)
def core(request):
    torch.manual_seed(0)
    return MAKERS[request.param]().eval().requires_grad_(False)


def test_a_dict_gives_a_code_for_each_stream_and_decodes_to_a_dict(core):
    x = acts(core)
    codes = core.encode(dict(reversed(x.items())))
    assert codes.dense().shape == (3, 10, M)
    out = core.decode(codes)
    assert list(out) == list(SPEC)
    for number, stream in enumerate(SPEC):
        own = core.encode_stream(stream, x[stream])
        assert_close(codes[number].dense(), own.dense())
        assert_close(out[stream], core.decode_stream(stream, own))
        assert_close(core.decode(codes[number]), out[stream])  # the codes know whose they are
        assert_close(core.decode(codes[:, 2:5])[stream], out[stream][2:5])
    assert_close(core.encode(x["image"]).dense(), codes[0].dense())
    assert_close(core(x["image"]), out["image"])


def test_rows_of_several_streams_are_not_decoded_blindly(core):
    flat, _ = core.by_row(core.encode(acts(core)), {})
    with pytest.raises(MmsaeError, match="mix the streams"):
        core.decode(flat)
    assert_close(core.decode(flat[:10]), core.decode(core.encode(acts(core)["image"])))
    with pytest.raises(MmsaeError, match="no stream 'imge'; nearest: image"):
        core.encode_stream("imge", acts(core)["image"])


def test_a_concept_crosses_over(core):
    codes = core.encode_stream("image", acts(core)["image"])
    none = Codes(torch.zeros(10, M), None, M)
    assert_close(core.decode_stream("text", codes) - core.decode_stream("text", none),
                 codes.dense() @ core.dictionaries["text"])  # fmt: skip


def test_stored_codes_have_a_row_for_each_stream(core):
    batches = [
        {ACTS: acts(core, n, n), "pair_id": torch.arange(n), "sample_id": 100 * n + torch.arange(n),
         "modality": torch.full((n,), MODALITIES["other"])}
        for n in (4, 3)
    ]  # fmt: skip
    latents = LatentStore.build(core, batches)
    assert latents.n_rows == 21
    assert latents.columns["stream"].tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [0] * 3 + [1] * 3 + [2] * 3
    assert set(latents.columns["modality"][latents.columns["stream"] == 1]) == {MODALITIES["text"]}
    assert latents.columns["pair_id"].tolist() == [0, 1, 2, 3] * 3 + [0, 1, 2] * 3
    text = (latents.columns["stream"] == 1) & (latents.columns["sample_id"] >= 400)
    want = core.encode_stream("text", batches[0][ACTS]["text"]).dense()
    assert_close(torch.from_numpy(latents.codes.toarray()[text]), want)
    batch = {**batches[0], ACTS: {"image": batches[0][ACTS]["image"]}}
    assert core.by_row(core.encode(batch[ACTS]["image"]), {"pair_id": batch["pair_id"]})[1].keys() == {"pair_id"}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_streams_of_different_scales_fold(make):
    core = make().requires_grad_(False).double()
    affine = {
        s: Affine(torch.randn(w, dtype=torch.float64), torch.tensor(0.1 + i, dtype=torch.float64))
        for i, (s, w) in enumerate(core.spec.streams.items())
    }
    x = {s: part.double() for s, part in acts(core).items()}
    codes = core.encode({s: affine[s].apply(part) for s, part in x.items()})
    want = {s: affine[s].invert(part) for s, part in core.decode(codes).items()}
    core.fold(affine)
    assert_close(core.encode(x).dense(), codes.dense())
    assert_close(core.decode(core.encode(x)), want)


def test_data_that_lack_a_stream_are_refused(core):
    core.check(core.spec)
    without = {stream: width for stream, width in core.spec.streams.items() if stream != "text"}
    with pytest.raises(MmsaeError, match="the dictionary reads 'text'"):
        core.check(ActivationSpec(without))


def test_what_cannot_be_shared_is_refused():
    for make in (GroupSparse, VLSAE, AlignmentAutoencoder):
        with pytest.raises(MmsaeError, match="give 'target' another name"):
            make({"image": 3, "target": 3}, M)
        with pytest.raises(MmsaeError, match="two or more streams"):
            make(3, M)
    with pytest.raises(MmsaeError, match=r"image \(3\), text \(4\)"):
        GroupSparse({"image": 3, "text": 4}, M)
    with pytest.raises(MmsaeError, match=r"image \(3\), text \(4\)"):
        VLSAE({"image": 3, "text": 4}, M, k=2)
    assert VLSAE({"image": 3, "text": 4}, M, k=2, shared_encoder=False).dictionaries["text"].shape == (M, 4)
