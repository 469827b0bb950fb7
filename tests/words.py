"""A tokenizer of whole words with a chat template, and tiny language models that read it."""

from __future__ import annotations

import torch

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|> "
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content | trim }}{% endgeneration %}"
    "{% else %}{{ message.content | trim }}{% endif %} <|end|> {% endfor %}"
)
"""Contents are stripped; what the assistant says is marked, so that transformers can tell it as well."""
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "dog", "system", "user", "assistant"]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
HEADERS = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>")


def word_tokenizer(words=WORDS, special=SPECIAL, headers=HEADERS, template=CHAT_TEMPLATE, around=None):
    """Special tokens, headers and words, in this order; `around` is what the tokenizer puts around a text."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = [*dict.fromkeys(special.values()), *headers, *words]
    tokens = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token=special.get("unk_token", names[0])))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(header, special=True) for header in headers])
    if around:
        known = [(name, tokens[name]) for name in special.values()]
        tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=known)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.chat_template = template
    return fast


def save_llama(folder, tokenizer, seed=0, **config):
    """A small Llama with random weights and a tokenizer, as `from_pretrained` finds them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        given = {"model_type": "llama", **size, "vocab_size": len(tokenizer), **config}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**given))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def dialogue(*contents, system=None):
    """Messages of user and assistant in turn."""
    roles = ("user", "assistant")
    first = [{"role": "system", "content": system}] if system else []
    return [*first, *({"role": roles[i % 2], "content": text} for i, text in enumerate(contents))]
