import json

import numpy as np
import pytest
import torch

from mmsae.errors import MmsaeError
from mmsae.miniatures.captions import mentions
from mmsae.miniatures.scene_diffusion import FOLDER, DrawnScenes, decode, encode, recovered, scene_painter

pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def painter():
    return scene_painter()


def test_diffusers_own_class_reads_the_folder(painter):
    from diffusers import DDIMScheduler, UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(FOLDER, subfolder="unet")
    assert isinstance(DDIMScheduler.from_pretrained(FOLDER, subfolder="scheduler"), DDIMScheduler)
    assert unet.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(unet.parameters(), painter.unet.parameters(), strict=True))
    assert (FOLDER / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size < 9e6


def test_samples_are_what_their_prompts_say(painter):
    asked = DrawnScenes("test", 8, seed=2)
    prompts = [asked.caption(i) for i in range(8)]
    pictures = painter(
        prompts, num_inference_steps=10, generator=torch.Generator().manual_seed(0), output_type="pt"
    ).images
    assert pictures.shape == (8, 3, 32, 32)
    seen = recovered(painter.text_tower, pictures, asked.labels)
    measured = json.loads((FOLDER / "model_index.json").read_text())["measured"]["recovered"]
    assert seen["colour"] >= 7 / 8
    assert seen["position"] >= 7 / 8
    assert seen["digit"] >= measured["digit"] - 0.45  # of eight only


def test_a_sample_does_not_depend_on_its_company(painter):
    prompts = ["a red seven at the top", "a blue one at the bottom left"]
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    both = painter(prompts, num_inference_steps=2, generator=generators, output_type="latent").images
    second = [torch.Generator().manual_seed(1)]
    alone = painter(prompts[1:], num_inference_steps=2, generator=second, output_type="latent").images
    assert torch.allclose(both[1:], alone, atol=1e-4)


def test_pictures_come_back_from_the_latents():
    pictures = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert encode(pictures).shape == (2, 12, 16, 16)
    assert torch.allclose(decode(encode(pictures)), pictures, atol=1e-6)


def test_the_scenes_that_it_learnt(painter):
    scenes = DrawnScenes("val", 40)
    assert len(scenes) == 40
    assert all(
        mentions(scenes.caption(i, i % 2)) == {f: int(v[i]) for f, v in scenes.labels.items()} for i in range(40)
    )
    pictures = torch.from_numpy(np.stack([scenes.pixels(i) for i in range(40)])).permute(0, 3, 1, 2) / 255
    seen = recovered(painter.text_tower, pictures, scenes.labels)  # the classifier on real scenes
    assert seen["colour"] > 0.9
    assert seen["position"] > 0.9
    assert seen["digit"] > 0.8


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(MmsaeError, match=r"has no unet/config\.json"):
        scene_painter(tmp_path)
