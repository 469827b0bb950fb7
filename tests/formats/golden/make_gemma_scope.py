"""Makes the golden folders gemma_scope_*: random weights in its layout, read and computed by sae-lens, with its Python.

SAELens has the reader that most people use for Gemma Scope; its download is replaced by the local file.
"""

import json
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from sae_lens.loading import pretrained_sae_loaders as loaders
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.transcoder import (
    JumpReLUSkipTranscoder,
    JumpReLUSkipTranscoderConfig,
    JumpReLUTranscoder,
    JumpReLUTranscoderConfig,
)
from safetensors.torch import save_file

HERE = Path(__file__).parent
D_IN, D_LATENT = 8, 16
CASES = {  # folder: (generation, path inside the repository)
    "gemma_scope_1": (1, "layer_1/width_16k/average_l0_5"),
    "gemma_scope_1_embedding": (1, "embedding/width_16k/average_l0_5"),
    "gemma_scope_2": (2, "resid_post/layer_1_width_16k_l0_small"),
    "gemma_scope_2_transcoder": (2, "transcoder/layer_1_width_16k_l0_small"),
    "gemma_scope_2_transcoder_affine": (2, "transcoder/layer_1_width_16k_l0_small_affine"),
}


@torch.no_grad()
def make(name: str, generation: int, inside: str) -> None:
    """One folder: a checkpoint as it is published, and what SAELens computes from it."""
    folder = HERE / name / inside
    shutil.rmtree(HERE / name, ignore_errors=True)
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(len(name))
    shapes = {"W_enc": (D_IN, D_LATENT), "W_dec": (D_LATENT, D_IN), "b_enc": (D_LATENT,), "b_dec": (D_IN,)}
    tensors = {key: torch.randn(shape, generator=generator) * 0.5 for key, shape in shapes.items()}
    tensors["threshold"] = torch.rand(D_LATENT, generator=generator)
    affine = "affine" in name
    if affine:
        tensors["affine_skip_connection"] = torch.randn(D_IN, D_IN, generator=generator) * 0.5
    if generation == 1:
        file = folder / "params.npz"
        np.savez(file, **{key: tensor.numpy() for key, tensor in tensors.items()})
    else:
        file = folder / "params.safetensors"
        save_file({key.replace("W_", "w_"): tensor for key, tensor in tensors.items()}, file)
        out = "model.layers.1.post_feedforward_layernorm.output" if "transcoder" in name else "model.layers.1.output"
        into = "model.layers.1.pre_feedforward_layernorm.output" if "transcoder" in name else out
        config = {"architecture": "jump_relu", "model_name": "gemma-v3-270m", "affine_connection": affine,
                  "hf_hook_point_in": into, "hf_hook_point_out": out}  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config))
    sizes = {key.replace("W_", "w_"): list(tensor.shape) for key, tensor in tensors.items()}
    with (
        mock.patch.object(
            loaders, "hf_hub_download", lambda *a, **k: str(file if "filename" in k else folder / "config.json")
        ),
        mock.patch.object(loaders, "get_safetensors_tensor_shapes", return_value=sizes),
        mock.patch.object(loaders, "get_gemma_2_config_from_hf", return_value={"d_in": D_IN}),
    ):
        load = loaders.gemma_2_sae_huggingface_loader if generation == 1 else loaders.gemma_3_sae_huggingface_loader
        _, state, _ = load("google/gemma-scope", inside)
    plain = {"d_in": D_IN, "d_sae": D_LATENT, "apply_b_dec_to_input": False}
    if affine:
        sae = JumpReLUSkipTranscoder(JumpReLUSkipTranscoderConfig(**plain, d_out=D_IN))
    elif "transcoder" in name:
        sae = JumpReLUTranscoder(JumpReLUTranscoderConfig(**plain, d_out=D_IN))
    else:
        sae = JumpReLUSAE(JumpReLUSAEConfig(**plain))
    sae.load_state_dict(state)
    x = torch.randn(32, D_IN, generator=generator) * (3 if "embedding" in name else 1) + 0.3
    save_file({"x": x, "codes": sae.encode(x), "reconstruction": sae(x)}, HERE / name / "expected.safetensors")


if __name__ == "__main__":
    for name, case in CASES.items():
        make(name, *case)
