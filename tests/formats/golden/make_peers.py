"""Makes the golden folders sparsify_* and dictionary_learning_*: run with a Python that has both, from this folder."""

import json
import os
import shutil
from pathlib import Path

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # before sparsify is imported: its other decoder wants a GPU

import torch
from dictionary_learning import dictionary, utils
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from safetensors.torch import save_file
from sparsify import SparseCoder, SparseCoderConfig

HERE = Path(__file__).parent
D_IN, D_LATENT, K = 8, 16, 3

SPARSIFY = {  # name: what differs from the defaults
    "topk": {"num_latents": D_LATENT},
    "expansion": {"expansion_factor": 2},
    "multi_topk": {"num_latents": D_LATENT, "multi_topk": True},
    "groupmax": {"num_latents": 15, "activation": "groupmax"},
    "transcoder": {"num_latents": D_LATENT, "transcode": True},
    "groupmax_transcoder": {"num_latents": 15, "activation": "groupmax", "transcode": True},
    "skip_transcoder": {"num_latents": D_LATENT, "transcode": True, "skip_connection": True},
    "skip": {"num_latents": D_LATENT, "skip_connection": True},
}
DICTIONARIES = {
    "AutoEncoder": lambda: dictionary.AutoEncoder(D_IN, D_LATENT),
    "AutoEncoderNew": lambda: dictionary.AutoEncoderNew(D_IN, D_LATENT),
    "GatedAutoEncoder": lambda: dictionary.GatedAutoEncoder(D_IN, D_LATENT),
    "AutoEncoderTopK": lambda: AutoEncoderTopK(D_IN, D_LATENT, K),
    "BatchTopKSAE": lambda: BatchTopKSAE(D_IN, D_LATENT, K),
    "MatryoshkaBatchTopKSAE": lambda: MatryoshkaBatchTopKSAE(D_IN, D_LATENT, K, [4, 12]),
    "JumpReluAutoEncoder": lambda: dictionary.JumpReluAutoEncoder(D_IN, D_LATENT),
}


def randomise(module: torch.nn.Module, seed: int) -> torch.Tensor:
    """Random weights and thresholds; returns inputs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        if hasattr(module, "threshold"):
            module.threshold.copy_(torch.rand(module.threshold.shape, generator=generator) + 0.2)
    return torch.randn(32, D_IN, generator=generator) + 0.3


@torch.no_grad()
def make_sparsify(name: str, config: dict) -> None:
    """One folder: what sparsify saves, and what it computes."""
    folder = fresh(f"sparsify_{name}")
    sae = SparseCoder(D_IN, SparseCoderConfig(k=K, **config))
    x = randomise(sae, len(name))
    sae.save_to_disk(folder)
    values, indices, _ = sae.encode(x)
    reconstruction = sae.decode(values, indices)
    if sae.W_skip is not None:  # as in its forward, which wants a GPU
        reconstruction = reconstruction + x @ sae.W_skip.mT
    codes = torch.zeros(len(x), sae.num_latents).scatter(1, indices, values)
    save_file({"x": x, "codes": codes, "reconstruction": reconstruction}, folder / "expected.safetensors")


@torch.no_grad()
def make_dictionary(name: str, make) -> None:
    """One folder as its trainers write it, and what the library's own loader computes from it."""
    folder = fresh(f"dictionary_learning_{name}")
    sae = make()
    x = randomise(sae, len(name))
    torch.save(sae.state_dict(), folder / "ae.pt")
    trainer = {"dict_class": name, "activation_dim": D_IN, "dict_size": D_LATENT, "layer": 1, "lm_name": "toy",
               "submodule_name": "resid_post_layer_1", **({"k": K} if hasattr(sae, "k") else {})}  # fmt: skip
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"d_submodule": D_IN}}, indent=1))
    loaded, _ = utils.load_dictionary(str(folder), "cpu")
    codes = loaded.encode(x)
    expected = {"x": x, "codes": codes.contiguous(), "reconstruction": loaded.decode(codes).contiguous()}
    save_file(expected, folder / "expected.safetensors")


def fresh(name: str) -> Path:
    """An empty folder."""
    shutil.rmtree(HERE / name, ignore_errors=True)
    (HERE / name).mkdir()
    return HERE / name


if __name__ == "__main__":
    for name, config in SPARSIFY.items():
        make_sparsify(name, config)
    for name, make in DICTIONARIES.items():
        make_dictionary(name, make)
