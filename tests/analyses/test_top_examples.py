import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import live

from mmsae.analyses import TopExamples
from mmsae.cores import Neurons, ReLU
from mmsae.latents import LatentStore
from mmsae.sources import Custom

BRIGHT = [(i % 4, (3 * i) % 4) for i in range(12)]  # place of the only bright patch of each picture


def patches():
    torch.manual_seed(0)
    net = torch.nn.Conv2d(3, 5, 8, 8, bias=False)
    with torch.no_grad():
        net.weight.fill_(1 / 192)
        net.weight[1:] *= torch.tensor([0.5, -1, 0, 0.1])[:, None, None, None]
    return torch.nn.Sequential(net)


def items(split):
    found = []
    for i, (row, column) in enumerate(BRIGHT):
        pixels = np.zeros((32, 32, 3), np.uint8)
        pixels[8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 100 + 10 * i
        labels = {"row": row}
        found.append({"image": Image.fromarray(pixels), "text": f"picture {i}", "sample_id": i, "labels": labels})
    return found


@pytest.fixture(scope="module")
def found():
    data = live()
    data.source = Custom(patches, ["0"], device="cpu", input_shape=[3, 32, 32])
    data.items = items
    data.factors = {"row": ("0", "1", "2", "3")}
    core = ReLU({"0": 5}, 5)
    with torch.no_grad():
        core.W_enc.copy_(torch.eye(5))
    core.eval()
    return TopExamples(n_examples=4).run(core, LatentStore.build(core, data.rows("test")), Shown(data))


class Shown:
    """The datamodule, which says that it has items although they were given to the instance."""

    has_items = True

    def __init__(self, data):
        self.data = data

    def __getattr__(self, name):
        return getattr(self.data, name)


def test_live_latents_are_shown_and_dead_ones_are_not(found):
    assert [entry["id"] for entry in found.latents] == [0, 1, 4]  # 2 is negative, 3 is silent


def test_the_strongest_pictures_come_first(found):
    for entry in found.latents:
        assert [e["sample"] for e in entry["examples"]] == [11, 10, 9, 8]
        activations = [e["activation"] for e in entry["examples"]]
        assert activations == sorted(activations, reverse=True)
        assert entry["max"] == activations[0]
        assert [c["text"] for c in entry["captions"]] == ["picture 11", "picture 10", "picture 9"]
        assert entry["density"] == pytest.approx(1 / 16)
        assert sum(entry["histogram"]["counts"]) == 12


def test_heat_is_at_the_patch_that_is_bright(found):
    for example in found.latents[0]["examples"]:
        heat = np.array(example["heat"])
        assert heat.shape == (4, 4)
        row, column = BRIGHT[example["sample"]]
        assert np.unravel_index(heat.argmax(), heat.shape) == (row, column)
        assert heat.max() == pytest.approx(example["activation"])
        assert (heat > 0).sum() == 1
        assert example["position"] == 4 * row + column


def test_pictures_are_stored_once_and_can_be_opened(found):
    assert len(found.media) == 4
    for entry in found.latents:
        for example in entry["examples"]:
            medium = found.media[example["media"]]
            assert medium["text"] == f"picture {example['sample']}"
            head, _, data = medium["data"].partition(",")
            assert head == "data:image/webp;base64"
            picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
            row, column = BRIGHT[example["sample"]]
            assert picture.shape == (32, 32, 3)
            assert picture[8 * row + 4, 8 * column + 4].min() > 150


def test_the_best_factor_is_named(found):
    for entry in found.latents:
        assert entry["factor"]["name"] == "row"
        assert 0.5 <= entry["factor"]["auroc"] <= 1


def test_without_items_there_are_numbers_only():
    data = live(10)
    core = Neurons({"0": 8}).eval()
    result = TopExamples(n_latents=3, n_examples=2).run(core, LatentStore.build(core, data.rows("test")), data)
    assert len(result.latents) == 3
    assert "5 more not shown" in result.title
    assert result.media == []
    for entry in result.latents:
        assert len(entry["examples"]) == 2
        assert all(e["media"] is None for e in entry["examples"])
        values = [abs(e["activation"]) for e in entry["examples"]]
        assert values == sorted(values, reverse=True)


def test_pairs_have_examples_of_each_stream():
    import modalities

    result = modalities.pairs(n_examples=2)
    first = result.latents[0]
    assert [side["name"] for side in first["sides"]] == ["image", "text"]
    assert [side["density"] for side in first["sides"]] == [3 / 9, 3 / 9]
    assert [side["max"] for side in first["sides"]] == pytest.approx([3.0, 1.6])
    shown = [(e["side"], e["sample"], e["activation"]) for e in first["examples"]]
    assert shown == [(0, 0, pytest.approx(3.0)), (0, 3, pytest.approx(2.7)), (1, 6, pytest.approx(1.6)),
                     (1, 3, pytest.approx(1.3))]  # fmt: skip
    kinds = [result.media[e["media"]]["kind"] for e in first["examples"]]
    assert kinds == ["image", "image", "text", "text"]
    assert result.media[first["examples"][1]["media"]]["text"] == "a red ball, take 3"
    assert result.media[first["examples"][3]["media"]]["tokens"] == [
        "a red ball, take 3"
    ]  # the same pair, not its picture
    assert [{e["side"] for e in latent["examples"]} for latent in result.latents[1:]] == [{0}, {1}]
    assert result.latents[1]["sides"][1] == {"name": "text", "density": 0.0, "max": 0.0}
    assert "sides" not in modalities.masks().latents[0]
