"""Makes the golden folders llamascopium_*, prisma_* and released_*: run with a Python that has sae-lens.

Llama Scope's files, Goodfire's and Qwen Scope's are read and computed by SAELens, whose download is replaced by the
local file. Llamascopium and ViT-Prisma are no packages of the registry: here their forward passes are written down
once more, plainly, from their descriptions.
"""

import json
import shutil
from pathlib import Path
from unittest import mock

import torch
from sae_lens.loading import pretrained_sae_loaders as loaders
from sae_lens.registry import get_sae_class
from safetensors.torch import save_file

HERE = Path(__file__).parent
D_IN, D_LATENT, K = 8, 16, 3
NORMS = {"blocks.1.in": 5.0, "blocks.1.out": 2.0}  # average norms of activations


def fresh(name: str, inside: str = ".") -> Path:
    """An empty folder."""
    shutil.rmtree(HERE / name, ignore_errors=True)
    (HERE / name / inside).mkdir(parents=True)
    return HERE / name / inside


def drawn(name: str, **shapes: tuple[int, ...]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Random tensors, and inputs."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    tensors = {key: 0.5 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    return tensors, torch.randn(32, D_IN, generator=generator) + 0.3


def expect(name: str, x: torch.Tensor, codes: torch.Tensor, reconstruction: torch.Tensor) -> None:
    """What must come out."""
    tensors = {"x": x, "codes": codes, "reconstruction": reconstruction}
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, HERE / name / "expected.safetensors")


# ---- by SAELens


@torch.no_grad()
def by_saelens(name: str, loader, file: Path, repo: str, folder: str, x: torch.Tensor, scale: float = 1.0) -> None:
    """Let SAELens read a file."""

    def download(*_, filename=None, **__):
        return str(next((HERE / name).rglob("*.json")) if filename is None else file)

    overrides = {"dtype": "float32", "d_in": D_IN, "d_sae": D_LATENT}
    with mock.patch.object(loaders, "hf_hub_download", download):
        config, state, _ = loader(repo, folder, "cpu", cfg_overrides=overrides)
    k = (config.get("activation_fn_kwargs") or {}).get("k")
    cls, config_cls = get_sae_class(config["architecture"])
    sae = cls(config_cls(d_in=D_IN, d_sae=D_LATENT, apply_b_dec_to_input=False, **({"k": k} if k else {})))
    sae.load_state_dict(state)
    if scale != 1:
        sae.fold_activation_norm_scaling_factor(scale)
    codes = sae.encode(x)
    expect(name, x, codes, sae.decode(codes))


LINEAR = {
    "encoder.weight": (D_LATENT, D_IN), "encoder.bias": (D_LATENT,), "decoder.weight": (D_IN, D_LATENT),
    "decoder.bias": (D_IN,),
}  # fmt: skip


def make_llama_scope() -> None:
    """The old release, with one threshold and decoder rows of norm 1."""
    name = "llamascopium_llama_scope"
    folder = fresh(name, "Llama3_1-8B-Base-L1R-8x/checkpoints").parent
    tensors, x = drawn(name, **LINEAR)
    tensors["decoder.weight"] /= tensors["decoder.weight"].norm(dim=0)
    file = folder / "checkpoints" / "final.safetensors"
    save_file(tensors, file)
    config = {"d_model": D_IN, "d_sae": D_LATENT, "act_fn": "topk", "top_k": K, "jump_relu_threshold": 0.3,
              "hook_point_in": "blocks.1.hook_resid_post", "hook_point_out": "blocks.1.hook_resid_post",
              "norm_activation": "dataset-wise",
              "dataset_average_activation_norm": {"in": 5.0, "out": 5.0}}  # fmt: skip
    (folder / "hyperparams.json").write_text(json.dumps(config))
    scale = D_IN**0.5 / 5
    by_saelens(name, loaders.llama_scope_sae_huggingface_loader, file, "fnlp/x", folder.name, x, scale)


def make_r1_distill() -> None:
    """The names between the old release and Llamascopium."""
    name = "llamascopium_r1_distill"
    folder = fresh(name, "L1R")
    tensors, x = drawn(name, **LINEAR, log_jumprelu_threshold=(D_LATENT,))
    tensors["decoder.weight"] /= tensors["decoder.weight"].norm(dim=0)
    hook = "blocks.1.hook_resid_post"
    file = folder / "sae_weights.safetensors"
    save_file({**tensors, f"dataset_average_activation_norm.{hook}": torch.tensor(5.0)}, file)
    config = {"sae_type": "sae", "d_model": D_IN, "expansion_factor": 2, "act_fn": "jumprelu", "hook_point_in": hook,
              "hook_point_out": hook, "norm_activation": "dataset-wise"}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    scale = D_IN**0.5 / 5
    by_saelens(name, loaders.llama_scope_r1_distill_sae_huggingface_loader, file, "fnlp/x", "L1R", x, scale)


def make_goodfire() -> None:
    """A state dict alone."""
    name = "released_goodfire"
    shapes = {key.replace(".", "_linear."): shape for key, shape in LINEAR.items()}
    tensors, x = drawn(name, **shapes)
    file = fresh(name) / "Llama-3.1-8B-Instruct-SAE-l19.pth"
    torch.save(tensors, file)
    by_saelens(
        name, loaders.get_goodfire_huggingface_loader, file, "Goodfire/Llama-3.1-8B-Instruct-SAE-l19", file.name, x
    )


def make_qwen_scope() -> None:
    """A state dict whose folder tells how many latents fire."""
    name, repo = "released_qwen_scope", f"SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}"
    tensors, x = drawn(name, W_enc=(D_LATENT, D_IN), b_enc=(D_LATENT,), W_dec=(D_IN, D_LATENT), b_dec=(D_IN,))
    file = fresh(name, repo) / "layer0.sae.pt"
    torch.save(tensors, file)
    by_saelens(name, loaders.qwen_scope_sae_huggingface_loader, file, f"Qwen/{repo}", file.name, x)


# ---- by their descriptions


def largest(pre: torch.Tensor, k: int = K) -> torch.Tensor:
    """The positive part of the k largest of each row."""
    return pre.relu() * torch.zeros_like(pre).scatter(-1, pre.topk(k).indices, 1.0)


LLAMASCOPIUM = {  # what differs from: act_fn relu, input and output alike, dataset-wise
    "relu": {},
    "jumprelu": {"act_fn": "jumprelu"},
    "jumprelu_plain": {"act_fn": "jumprelu", "sparsity_include_decoder_norm": False, "use_decoder_bias": False},
    "topk": {"act_fn": "topk"},
    "topk_plain": {"act_fn": "topk", "sparsity_include_decoder_norm": False},
    "inference": {"act_fn": "jumprelu", "norm_activation": "inference"},
    "transcoder": {"act_fn": "jumprelu", "hook_point_out": "blocks.1.out"},
}


def make_llamascopium(name: str, changes: dict) -> None:
    """One folder, alternately with a pickle."""
    folder = fresh(f"llamascopium_{name}")
    config = {"sae_type": "sae", "d_model": D_IN, "expansion_factor": 2.0, "act_fn": "relu", "top_k": K,
              "hook_point_in": "blocks.1.in", "hook_point_out": "blocks.1.in", "norm_activation": "dataset-wise",
              "sparsity_include_decoder_norm": True, "use_decoder_bias": True, **changes}  # fmt: skip
    shapes = {"W_E": (D_IN, D_LATENT), "b_E": (D_LATENT,), "W_D": (D_LATENT, D_IN), "b_D": (D_IN,)}
    state, x = drawn(name, **shapes, threshold=(D_LATENT,))
    log_threshold = state.pop("threshold") - 0.5
    if config["act_fn"] == "jumprelu":
        state["activation_function.log_jumprelu_threshold"] = log_threshold
    if not config["use_decoder_bias"]:
        del state["b_D"]
    hooks = [config["hook_point_in"], config["hook_point_out"]]
    norms = {f"dataset_average_activation_norm.{hook}": torch.tensor(NORMS[hook]) for hook in hooks}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "lm_config.json").write_text(json.dumps({"model_name": "toy"}))
    if "topk" in name:
        torch.save({"sae": {**state, **norms}, "version": "2.0"}, folder / "sae_weights.pt")
    else:
        save_file({**state, **norms}, folder / "sae_weights.safetensors")

    scales = [1.0 if name == "inference" else D_IN**0.5 / NORMS[hook] for hook in hooks]
    pre = (x * scales[0]) @ state["W_E"] + state["b_E"]
    unit = state["W_D"].norm(dim=-1) if config["sparsity_include_decoder_norm"] else torch.ones(D_LATENT)
    gated = pre * unit
    if config["act_fn"] == "relu":
        gated = gated * (gated > 0)
    elif config["act_fn"] == "jumprelu":
        gated = gated * (gated > log_threshold.exp())
    else:
        gated = largest(gated)
    codes = gated / unit
    expect(folder.name, x, codes, (codes @ state["W_D"] + state.get("b_D", 0)) / scales[1])


def make_crosscoder() -> None:
    """Two streams, each normalised by its norm; `x` and the reconstruction hold them side by side."""
    folder = fresh("llamascopium_crosscoder")
    shapes = {"W_E": (2, D_IN, D_LATENT), "b_E": (2, D_LATENT), "W_D": (2, D_LATENT, D_IN), "b_D": (2, D_IN)}
    state, x = drawn("crosscoder", **shapes, other=(32, D_IN))
    streams = [x, state.pop("other") * 4]
    norms = {f"dataset_average_activation_norm.{hook}": torch.tensor(norm) for hook, norm in NORMS.items()}
    save_file({**state, **norms}, folder / "sae_weights.safetensors")
    config = {"sae_type": "crosscoder", "d_model": D_IN, "expansion_factor": 2.0, "act_fn": "relu",
              "hook_points": list(NORMS), "norm_activation": "dataset-wise"}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    scales = [D_IN**0.5 / norm for norm in NORMS.values()]
    pre = sum(streams[i] * scales[i] @ state["W_E"][i] + state["b_E"][i] for i in range(2))
    unit = state["W_D"].norm(dim=-1)
    per_stream = [(pre * unit[i]).relu() / unit[i] for i in range(2)]  # the same in both
    out = [(per_stream[i] @ state["W_D"][i] + state["b_D"][i]) / scales[i] for i in range(2)]
    expect(folder.name, torch.cat(streams, -1), per_stream[0], torch.cat(out, -1))


TOPK = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}
PRISMA = {
    "standard": {},
    "topk": TOPK,
    "gated": {"architecture": "gated"},
    "transcoder": {"is_transcoder": True, "transcoder_with_skip_connection": False, "d_out": 6},
    "skip_transcoder": {"is_transcoder": True, "transcoder_with_skip_connection": True, "d_out": D_IN},
    "topk_skip_transcoder": {"is_transcoder": True, "transcoder_with_skip_connection": True, "d_out": D_IN, **TOPK},
}


def make_prisma(name: str, changes: dict) -> None:
    """One folder; `topk` as one file with a plain config in it."""
    folder = fresh(f"prisma_{name}")
    config = {"architecture": "standard", "activation_fn_str": "relu", "activation_fn_kwargs": {}, "d_in": D_IN,
              "expansion_factor": 2, "normalize_activations": "none", "model_name": "toy", "hook_point_layer": 1,
              "layer_subtype": "hook_resid_post", **changes}  # fmt: skip
    d_out = config.get("d_out", D_IN)
    shapes = {"W_enc": (D_IN, D_LATENT), "b_enc": (D_LATENT,), "W_dec": (D_LATENT, d_out), "b_dec": (D_IN,)}
    if config["architecture"] == "gated":
        shapes |= {"b_gate": (D_LATENT,), "r_mag": (D_LATENT,), "b_mag": (D_LATENT,)}
    if config.get("is_transcoder"):
        shapes |= {"b_dec_out": (d_out,)}
    if config.get("transcoder_with_skip_connection"):
        shapes |= {"W_skip": (D_IN, D_IN)}
    state, x = drawn(name, **shapes)
    if name == "topk":
        torch.save({"cfg": config, "state_dict": state}, folder / "n_images_100.pt")
    else:
        torch.save(state, folder / "weights.pt")
        (folder / "config.json").write_text(json.dumps(config))

    product = (x - state["b_dec"]) @ state["W_enc"]
    if config["architecture"] == "gated":
        codes = (product + state["b_gate"] > 0) * (product * state["r_mag"].exp() + state["b_mag"]).relu()
    else:
        pre = product + state["b_enc"]
        codes = pre.relu() if config["activation_fn_str"] == "relu" else largest(pre)
    out = codes @ state["W_dec"] + state.get("b_dec_out", state["b_dec"])
    expect(folder.name, x, codes, out + x @ state["W_skip"].mT if "W_skip" in state else out)


if __name__ == "__main__":
    make_llama_scope()
    make_r1_distill()
    make_goodfire()
    make_qwen_scope()
    for name, changes in LLAMASCOPIUM.items():
        make_llamascopium(name, changes)
    make_crosscoder()
    for name, changes in PRISMA.items():
        make_prisma(name, changes)
