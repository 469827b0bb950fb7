"""Tiny diffusion pipelines of diffusers' own classes, with random weights, saved as `from_pretrained` finds them."""

from __future__ import annotations

import json
from pathlib import Path

import torch

KINDS = ("sd", "sdxl", "dit", "pixart", "sd3", "flux")
POINTS = {
    "sd": "unet.mid_block.attentions.0:delta",
    "sdxl": "unet.down_blocks.1.attentions.0:delta",
    "dit": "transformer.transformer_blocks.1:delta",
    "pixart": "transformer.transformer_blocks.1:delta",
    "sd3": "transformer.transformer_blocks.0:delta[1]",
    "flux": "transformer.transformer_blocks.1:delta[1]",
}
SIDES = {"sd": 4, "sdxl": 4, "dit": 4, "pixart": 16, "sd3": 4, "flux": 4}  # of the grid at these points


def save_pipeline(kind, folder, deep=False):
    """Write the pipeline; no text encoders, but for `sd`, whose CLIP comes with a tokenizer of a few words.

    With `deep` the UNets have the blocks that the released ones have, and `sdxl` its two text encoders.
    """
    import diffusers as d

    torch.manual_seed(0)
    vae = {"block_out_channels": (8, 8), "down_block_types": ("DownEncoderBlock2D",) * 2, "norm_num_groups": 4}
    vae |= {"up_block_types": ("UpDecoderBlock2D",) * 2, "layers_per_block": 1}
    unet = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (16, 32), "layers_per_block": 1,
        "norm_num_groups": 4, "attention_head_dim": 4, "cross_attention_dim": 16,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    if deep:
        kinds = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
        unet |= {"layers_per_block": 2, "block_out_channels": (16, 32, 32), "down_block_types": kinds}
        unet["up_block_types"] = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
    if kind == "sd":
        tokenizer, encoder = clip_text()
        pipe = d.StableDiffusionPipeline(
            vae=d.AutoencoderKL(**vae), unet=d.UNet2DConditionModel(**unet), scheduler=d.DDIMScheduler(),
            tokenizer=tokenizer, text_encoder=encoder, safety_checker=None, feature_extractor=None,
            requires_safety_checker=False,
        )  # fmt: skip
    elif kind == "sdxl":
        added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "use_linear_projection": True}
        network = d.UNet2DConditionModel(**unet, **added, projection_class_embeddings_input_dim=40)
        words = [*clip_text(8), *clip_text(8, projected=16)] if deep else [None] * 4
        pipe = d.StableDiffusionXLPipeline(
            vae=d.AutoencoderKL(**vae), unet=network, scheduler=d.EulerAncestralDiscreteScheduler(),
            tokenizer=words[0], text_encoder=words[1], tokenizer_2=words[2], text_encoder_2=words[3],
        )  # fmt: skip
    elif kind == "dit":
        network = d.DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
            patch_size=2, num_embeds_ada_norm=1000,
        )  # fmt: skip
        pipe = d.DiTPipeline(network, d.AutoencoderKL(**vae), d.DDIMScheduler())
    elif kind == "pixart":
        network = d.PixArtTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=32,
            patch_size=2, cross_attention_dim=16, caption_channels=16, use_additional_conditions=False,
        )  # fmt: skip
        pipe = d.PixArtAlphaPipeline(None, None, d.AutoencoderKL(**vae), network, d.DPMSolverMultistepScheduler())
    elif kind == "sd3":
        network = d.SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=12,
        )  # fmt: skip
        pipe = d.StableDiffusion3Pipeline(
            network, d.FlowMatchEulerDiscreteScheduler(), d.AutoencoderKL(**vae, shift_factor=0.1),
            None, None, None, None, None, None,
        )  # fmt: skip
    else:
        network = d.FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=2, num_single_layers=1, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=12, guidance_embeds=True,
            axes_dims_rope=(2, 2, 4),
        )  # fmt: skip
        pipe = d.FluxPipeline(
            d.FlowMatchEulerDiscreteScheduler(), d.AutoencoderKL(**vae, shift_factor=0.1), None, None, None, None,
            network,
        )  # fmt: skip
    pipe.save_pretrained(folder)
    if kind == "dit":  # names of classes, where the released pipelines have them
        index = Path(folder) / "model_index.json"
        names = {"id2label": {"0": "cat", "1": "dog, hound"}}
        index.write_text(json.dumps(json.loads(index.read_text()) | names))


def clip_text(width=16, projected=None):
    """A tokenizer of single letters and a CLIP text encoder, the second one of SDXL where `projected` is given."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    letters = [chr(i) for i in range(97, 123)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=12)
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=12, bos_token_id=0, eos_token_id=1, pad_token_id=1, projection_dim=projected or width,
    )  # fmt: skip
    return tokenizer, (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def items_for(kind, n=2):
    """Items that a pipeline of this kind reads, all different."""
    generator = torch.Generator().manual_seed(5)
    if kind == "sd":
        return [{"sample_id": i, "text": text} for i, text in enumerate(("a b", "c d e", "f")[:n])]
    if kind == "dit":
        return [{"sample_id": i, "class_label": i} for i in range(n)]
    items = []
    for i in range(n):
        item = {"sample_id": i, "text": f"prompt {i}"}
        for sign in ("", "negative_"):
            item[f"{sign}prompt_embeds"] = torch.randn(6, 16, generator=generator)
            if kind == "pixart":
                item[f"{sign}prompt_attention_mask"] = torch.ones(6, dtype=torch.int64)
            else:
                item[f"{sign}pooled_prompt_embeds"] = torch.randn(16 if kind == "sdxl" else 12, generator=generator)
        items.append(item)
    return items
