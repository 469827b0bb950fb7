"""Tiny multimodal models of transformers with random weights, and processors made here, as folders."""

from __future__ import annotations

import torch
from words import SPECIAL, word_tokenizer

SIDE, PATCH = 32, 8
WORDS = ["what", "colour", "is", "the", "cat", "it", "a", "red", "blue", "where", "describe", "picture", ".", "?"]
IMAGE = {"qwen2_vl": "<|image_pad|>", "qwen2_5_vl": "<|image_pad|>", "gemma3": "<image_soft_token>"}
HEADERS = {
    "idefics3": [
        "<fake_token_around_image>", "<global-img>", "<end_of_utterance>",
        *(f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)),
    ],
    "qwen2_5_vl": ["<|vision_start|>", "<|vision_end|>", "<|video_pad|>"],
    "llava_onevision": ["<video>"],
    "gemma3": ["<start_of_image>", "<end_of_image>"],
    "chameleon": ["<racm3:break>", "<eoss>"],
}  # fmt: skip
HEADERS |= {"smolvlm": HEADERS["idefics3"], "qwen2_vl": HEADERS["qwen2_5_vl"]}
PLACEHOLDER = {"qwen2_vl": "<|vision_start|><|image_pad|><|vision_end|>", "gemma3": "<start_of_image>"}
PLACEHOLDER["qwen2_5_vl"] = PLACEHOLDER["qwen2_vl"]
FAMILIES = ("llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "idefics3", "smolvlm", "gemma3")
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "max_position_embeddings": 1024}  # fmt: skip
VISION = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
          "image_size": SIDE, "patch_size": PATCH}  # fmt: skip
PINPOINTS = [[32, 64], [64, 32], [64, 64], [32, 96], [96, 32]]


def template(placeholder: str) -> str:
    """A chat template in the manner of these models: image placeholders before the words of a message."""
    return (
        "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|> "
        "{% for part in message.content %}{% if part.type == 'image' %}" + placeholder + "{% else %} {{ part.text }}"
        "{% endif %}{% endfor %} <|end|> {% endfor %}{% if add_generation_prompt %}<|assistant|> {% endif %}"
    )


def save_lmm(folder, family: str, seed: int = 0, layers: int = 2):
    """A model and a processor of a family in a folder."""
    import transformers as t

    image = IMAGE.get(family, "<image>")
    chat = template(PLACEHOLDER.get(family, image))
    names = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>", image, *HEADERS.get(family, [])]
    tokenizer = word_tokenizer(WORDS, headers=names, template=chat)
    if family == "gemma3":
        named = {"image_token": image, "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
        inner = tokenizer.backend_tokenizer
        tokenizer = t.PreTrainedTokenizerFast(tokenizer_object=inner, **SPECIAL, extra_special_tokens=named)
    size = {"height": SIDE, "width": SIDE}
    text = {"model_type": "llama", "vocab_size": len(tokenizer), **TEXT, "num_hidden_layers": layers}
    number = tokenizer.convert_tokens_to_ids
    clip = {"model_type": "clip_vision_model", **VISION}
    if family == "llava":
        images = t.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=size)
        processor = t.LlavaProcessor(images, tokenizer, PATCH, "default", chat, image, 1)
        config = t.LlavaConfig(
            vision_config=clip,
            text_config=text,
            image_token_index=number(image),
            vision_feature_layer=-1,
            image_seq_length=16,
        )
    elif family == "llava_next":
        images = t.LlavaNextImageProcessor(size={"shortest_edge": SIDE}, crop_size=size, image_grid_pinpoints=PINPOINTS)
        processor = t.LlavaNextProcessor(images, tokenizer, PATCH, "default", chat, image, 1)
        config = t.LlavaNextConfig(
            vision_config=clip, text_config=text, image_token_index=number(image), vision_feature_layer=-1,
            image_grid_pinpoints=PINPOINTS, image_seq_length=16,
        )  # fmt: skip
    elif family == "llava_onevision":
        images = t.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=PINPOINTS)
        video = t.LlavaOnevisionVideoProcessor(size=size)
        processor = t.LlavaOnevisionProcessor(
            images, tokenizer, video, num_image_tokens=16, vision_feature_select_strategy="full", chat_template=chat,
            image_token=image, video_token="<video>", vision_aspect_ratio="anyres_max_9",
        )  # fmt: skip
        config = t.LlavaOnevisionConfig(
            vision_config={"model_type": "siglip_vision_model", **VISION, "vision_use_head": False}, text_config=text,
            image_token_index=number(image), video_token_index=number("<video>"), vision_feature_layer=-1,
            vision_feature_select_strategy="full", image_grid_pinpoints=PINPOINTS,
        )  # fmt: skip
    elif family in ("qwen2_vl", "qwen2_5_vl"):
        images = t.Qwen2VLImageProcessor(patch_size=8, merge_size=2, temporal_patch_size=2,
                                         size={"shortest_edge": 32 * 32, "longest_edge": 96 * 96})  # fmt: skip
        video = t.Qwen2VLVideoProcessor(patch_size=8, merge_size=2)
        kind = t.Qwen2VLProcessor if family == "qwen2_vl" else t.Qwen2_5_VLProcessor
        tokenizer.image_token, tokenizer.video_token = image, "<|video_pad|>"
        processor = kind(images, tokenizer, video, chat_template=chat)
        shape = {"depth": 2, "num_heads": 2, "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2}
        if family == "qwen2_vl":
            vision = {**shape, "embed_dim": 24, "hidden_size": 32, "mlp_ratio": 2}
        else:
            vision = {**shape, "hidden_size": 24, "intermediate_size": 32, "out_hidden_size": 32, "window_size": 32,
                      "fullatt_block_indexes": [1]}  # fmt: skip
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
        text = {k: v for k, v in text.items() if k != "model_type"} | {"rope_parameters": rope}
        kind = t.Qwen2VLConfig if family == "qwen2_vl" else t.Qwen2_5_VLConfig
        ids = {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>",
               "video_token_id": "<|video_pad|>"}  # fmt: skip
        config = kind(
            text_config=text,
            vision_config=vision,
            image_token_id=number(image),
            **{k: number(v) for k, v in ids.items()},
        )
    elif family in ("idefics3", "smolvlm"):
        ours = t.Idefics3ImageProcessor if family == "idefics3" else t.SmolVLMImageProcessor
        images = ours(size={"longest_edge": 3 * SIDE}, max_image_size={"longest_edge": SIDE})
        if family == "idefics3":
            processor = t.Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=chat)
        else:
            video = t.SmolVLMVideoProcessor(size={"longest_edge": SIDE}, max_image_size={"longest_edge": SIDE})
            processor = t.SmolVLMProcessor(images, tokenizer, video, image_seq_len=4, chat_template=chat)
        kind = t.Idefics3Config if family == "idefics3" else t.SmolVLMConfig
        config = kind(vision_config=VISION, text_config=text, scale_factor=2, image_token_id=number(image),
                      pad_token_id=tokenizer.pad_token_id)  # fmt: skip
    elif family == "chameleon":  # its processor takes no template, and knows no places of image tokens
        images = t.ChameleonImageProcessor(size={"shortest_edge": SIDE}, crop_size=size)
        processor = t.ChameleonProcessor(images, tokenizer, image_seq_length=16, image_token=image)
        letters = ["".join("ABCDEFGHIJ"[int(digit)] for digit in str(i)) for i in range(32)]
        codes = {f"IMGIMG{name}Z": len(tokenizer) + i for i, name in enumerate(letters)} | {image: number(image)}
        vq = {"embed_dim": 16, "num_embeddings": 32, "latent_channels": 16, "resolution": SIDE, "base_channels": 32,
              "channel_multiplier": [1, 1, 1, 1], "num_res_blocks": 1, "attn_resolutions": None}  # fmt: skip
        text = {k: v for k, v in text.items() if k != "model_type"} | {"vocab_size": len(tokenizer) + 32}
        config = t.ChameleonConfig(**text, vocabulary_map=codes, vq_config=vq)
    else:
        images = t.Gemma3ImageProcessor(size=size)
        processor = t.Gemma3Processor(images, tokenizer, chat_template=chat, image_seq_length=4)
        text = {k: v for k, v in text.items() if k != "model_type"} | {"head_dim": 16}
        config = t.Gemma3Config(
            text_config=text, vision_config=VISION, mm_tokens_per_image=4, image_token_index=number(image),
            boi_token_index=number("<start_of_image>"), eoi_token_index=number("<end_of_image>"),
        )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = t.AutoModelForImageTextToText.from_config(config)
        if family == "gemma3":  # begins with zeros
            torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
