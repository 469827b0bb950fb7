"""Gradients travel beside activations: through the live buffer, through a store, and to a core that needs them."""

import pytest
import torch
from tiny import D, adam, live, trainer, vectors_source
from torch import nn
from torch.testing import assert_close

from mmsae.cores import GradientTopK
from mmsae.errors import MmsaeError
from mmsae.sources import Custom
from mmsae.store import Store, Writer
from mmsae.training.module import SAEModule

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def classifier():
    return nn.Sequential(nn.Identity(), nn.Flatten(), nn.Linear(3 * D, 2))


def data(**arguments):
    made = live(**{"gradients": True, **arguments})
    if made.store is None:
        made.source = Custom(classifier, ["0"], modality="signal", input_shape=[3, D], device="cpu")
    return made


def write(folder, **arguments):
    source = data().source
    for split in ("train", "val", "test"):
        writer = Writer(folder / split, {"x": 1}, **{"dtype": "float32", "rows_per_shard": 100, **arguments})
        writer.resume()
        for batch in data().item_batches(split):
            writer.add(source.read(batch, gradients=True))
        writer.close()
        writer.finish({"class": "Toy"}, {"class": "Toy"}, {})
    return folder


def test_a_store_keeps_them_in_row_order(tmp_path):
    store = Store(write(tmp_path) / "train")
    assert store.manifest.gradients
    assert not any(name.startswith(("acts", "grads")) for name in store.manifest.columns)
    want = next(iter(data().rows("train")))
    n = len(want["sample_id"])
    got = store.read([(0, 0, n)], gradients=True)
    assert_close(got["grads"], want["grads"])
    assert_close(got["acts"], want["acts"])
    assert "grads" not in store.read([(0, 0, n)])


def test_half_precision_has_room_for_small_ones(tmp_path):
    store = Store(write(tmp_path, dtype="float16") / "train")
    got = store.read([(0, 0, 5)], gradients=True)
    assert got["acts"]["0"].dtype == torch.float16
    assert got["grads"]["0"].dtype == torch.bfloat16


def test_training_from_a_store_is_training_live(tmp_path):
    weights = []
    for loaded in (data(), data(store=str(write(tmp_path)), block_rows=1000)):
        torch.manual_seed(0)
        module = SAEModule(GradientTopK({"0": D}, 16, k=3), optimizer=adam(), normalise="center_scale")
        trainer(max_steps=15).fit(module, loaded)
        sample = next(iter(loaded.train_dataloader()))
        assert sample["grads"]["0"].shape == sample["acts"]["0"].shape
        weights.append(module)
        assert module.core.gradient_norm != 1
    for module in weights:
        batch = next(iter(data().rows("test")))
        folded = module.export().train()
        got = folded.encode(folded.inputs(batch), batch).dense()
        normalised = module.normalised(batch)
        want = module.core.train().encode(module.core.inputs(normalised), normalised).dense()
        assert_close(got > 0, want > 0)


def test_what_is_missing_is_said_before_the_first_step(tmp_path):
    module = SAEModule(GradientTopK({"0": D}, 16, k=3), optimizer=adam())
    with pytest.raises(MmsaeError, match=r"set data\.gradients=true"):
        trainer().fit(module, data(gradients=False))
    plain = Writer(tmp_path / "train", {"x": 1}, "float32", 100)
    plain.resume()
    source = vectors_source()
    plain.add(source.read(source.collate([live().items("train")[0]])))
    plain.close()
    plain.finish({"class": "Toy"}, {"class": "Toy"}, {})
    with pytest.raises(MmsaeError, match="has no gradients: extract it again"):
        data(store=str(tmp_path), batch_size=2).train_dataloader()
