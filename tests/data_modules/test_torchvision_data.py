import numpy as np
import pytest
from towers import fashion

from datamodules import TorchvisionData
from mmsae.errors import MmsaeError
from mmsae.sources import SceneCLIP


def source():
    return SceneCLIP(["visual"], device="cpu")


def test_val_is_taken_out_of_the_training_part(tmp_path):
    data = TorchvisionData("FashionMNIST", fashion(tmp_path), val_share=0.2, source=source())
    assert {split: len(data.items(split)) for split in ("train", "val", "test")} == {"train": 16, "val": 4, "test": 20}
    assert data.factors["class"][9] == "Ankle boot"
    item = data.items("val")[1]
    assert item["labels"]["class"] == np.asarray(item["image"])[0, 0] % 10
    both = [np.asarray(data.items(s)[i]["image"])[0, 0] for s in ("train", "val") for i in range(len(data.items(s)))]
    assert sorted(both) == list(range(20))


def test_what_is_missing_is_told_before_any_model_is_loaded(tmp_path):
    with pytest.raises(MmsaeError, match=r"has no FashionMNIST .*give its folder as root, or set download=true"):
        TorchvisionData("FashionMNIST", str(tmp_path), source=source())
    with pytest.raises(MmsaeError, match=r"no labelled pictures 'FashionMNISt'; nearest: FashionMNIST"):
        TorchvisionData("FashionMNISt", str(tmp_path), source=source())
    with pytest.raises(MmsaeError, match="no labelled pictures 'CocoDetection'"):
        TorchvisionData("CocoDetection", str(tmp_path), source=source())
