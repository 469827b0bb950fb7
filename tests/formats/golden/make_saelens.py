"""Makes the golden files saelens_*: run with a Python that has sae-lens, from this folder."""

import shutil
from pathlib import Path

import torch
from sae_lens import SAE, registry
from sae_lens.saes import sae as sae_module
from safetensors.torch import save_file

HERE = Path(__file__).parent
D_IN, D_SAE, D_OUT = 8, 16, 6
TOPK = {"k": 3}
PURSUIT = {"stop_on_duplicate_support": False}

CASES = {  # name: (training class?, architecture, config)
    "standard": (False, "standard", {}),
    "standard_uncentred": (False, "standard", {"apply_b_dec_to_input": False}),
    "topk": (False, "topk", TOPK),
    "topk_rescale": (False, "topk", {**TOPK, "rescale_acts_by_decoder_norm": True}),
    "topk_uncentred": (False, "topk", {**TOPK, "apply_b_dec_to_input": False}),
    "abstopk": (False, "abstopk", TOPK),
    "abstopk_rescale": (False, "abstopk", {**TOPK, "rescale_acts_by_decoder_norm": True}),
    "gated": (False, "gated", {}),
    "gated_uncentred": (False, "gated", {"apply_b_dec_to_input": False}),
    "gated_training": (True, "gated", {}),
    "matching_pursuit": (False, "matching_pursuit", {**PURSUIT, "residual_threshold": 0.5, "max_iterations": 5}),
    "matching_pursuit_all": (False, "matching_pursuit", {**PURSUIT, "residual_threshold": 0.0}),
    "matching_pursuit_default": (False, "matching_pursuit", {}),
    "matching_pursuit_uncentred": (
        False, "matching_pursuit", {**PURSUIT, "max_iterations": 3, "apply_b_dec_to_input": False}
    ),
    "jumprelu": (False, "jumprelu", {}),
    "jumprelu_uncentred": (False, "jumprelu", {"apply_b_dec_to_input": False}),
    "transcoder": (False, "transcoder", {"d_out": D_OUT, "apply_b_dec_to_input": False}),
    "jumprelu_transcoder": (False, "jumprelu_transcoder", {"d_out": D_OUT, "apply_b_dec_to_input": False}),
    "skip_transcoder": (False, "skip_transcoder", {"d_out": D_OUT, "apply_b_dec_to_input": False}),
    "jumprelu_skip_transcoder": (
        False, "jumprelu_skip_transcoder", {"d_out": D_OUT, "apply_b_dec_to_input": False}
    ),
    "batchtopk": (True, "batchtopk", TOPK),
    "matryoshka": (True, "matryoshka_batchtopk", {**TOPK, "matryoshka_widths": [4, 16]}),
    "topk_training": (True, "topk", TOPK),
}  # fmt: skip


def make(name: str, training: bool, architecture: str, config: dict) -> None:
    """One folder: what SAELens saves, and what it computes."""
    folder = HERE / f"saelens_{name}"
    shutil.rmtree(folder, ignore_errors=True)
    get = registry.get_sae_training_class if training else registry.get_sae_class
    cls, cfg_cls = get(architecture)
    sae = cls(cfg_cls(d_in=D_IN, d_sae=D_SAE, **config))
    sae.cfg.metadata.model_name, sae.cfg.metadata.hook_name = "toy", "blocks.0.hook_resid_pre"
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        if architecture == "matching_pursuit":  # trained with unit rows; longer ones take away more than there is
            sae.W_dec /= sae.W_dec.norm(dim=-1, keepdim=True)
        if hasattr(sae, "threshold"):
            sae.threshold.copy_(torch.rand(D_SAE, generator=generator) - 0.1)
        if hasattr(sae, "topk_threshold"):
            sae.topk_threshold = torch.tensor(0.7, dtype=torch.float64)
        sae.save_model(folder)
        x = torch.randn(32, D_IN, generator=generator) + 0.3
        if "batchtopk" in architecture:  # at inference its threshold applies, not the budget: what SAELens exports
            sae.save_inference_model(folder / "inference")
            sae = SAE.load_from_disk(folder / "inference")
            shutil.rmtree(folder / "inference")
        codes = sae.encode(x)
        reconstruction = sae.decode(codes) if training else sae(x)  # of a skip connection only the call knows
        save_file({"x": x, "codes": codes, "reconstruction": reconstruction}, folder / "expected.safetensors")


if __name__ == "__main__":
    print(sae_module.__version__)
    for name, case in CASES.items():
        make(name, *case)
