import pytest
import torch
from words import WORDS, dialogue, save_llama, word_tokenizer

from mmsae.errors import MmsaeError
from mmsae.sources import CausalLM
from mmsae.sources.chat import ROLES, coded_dialogue, rendered, words_of


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def said(tokenizer, messages, template=None):
    """The words that each role is told to have said."""
    text = rendered(tokenizer, messages, template)
    return [(role, text[start:end]) for role, start, end in words_of(tokenizer, messages, text, template)]


def test_every_token_has_the_role_of_who_says_it(tokenizer):
    coded = coded_dialogue(tokenizer, dialogue(" the cat ", "user sat", "a mat", "on", system="the system"))
    names = tokenizer.convert_ids_to_tokens(coded.ids)
    assert [(name, ROLES[role]) for name, role in zip(names, coded.columns["role"], strict=True)] == [
        ("<s>", "template"), ("<|system|>", "template"), ("the", "system"), ("system", "system"),
        ("<|end|>", "template"), ("<|user|>", "template"), ("the", "user"), ("cat", "user"), ("<|end|>", "template"),
        ("<|assistant|>", "template"), ("user", "assistant"), ("sat", "assistant"), ("<|end|>", "template"),
        ("<|user|>", "template"), ("a", "user"), ("mat", "user"), ("<|end|>", "template"),
        ("<|assistant|>", "template"), ("on", "assistant"), ("<|end|>", "template"),
    ]  # fmt: skip


def test_the_assistant_is_where_transformers_says(tokenizer):
    messages = dialogue("the cat", "sat on", "a dog", "saw the mat and sat")
    theirs = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    ours = coded_dialogue(tokenizer, messages)
    assert ours.ids == theirs["input_ids"]
    assert [int(r == ROLES.index("assistant")) for r in ours.columns["role"]] == theirs["assistant_masks"]
    assert sum(theirs["assistant_masks"]) == 7


DEFAULT_SYSTEM = (  # as Qwen2.5: a system message of its own where none is given, none of its words anybody's
    "{% if messages[0].role != 'system' %}<|system|>the cat<|end|>{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
)
SYSTEM_INSIDE = (  # as Llama 2 and Gemma: the system message stands in the first turn of the user
    "{% set system = messages[0].content + ' | ' if messages[0].role == 'system' else '' %}"
    "{% for m in messages %}{% if m.role == 'user' %}[{{ (system if loop.index0 < 2 else '') + m.content }}]"
    "{% elif m.role == 'assistant' %}{{ m.content }};{% endif %}{% endfor %}"
)
THOUGHTS = (  # as Qwen3: thoughts of earlier turns are left out, and an empty thought is put in where there is none
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' and loop.last and '<think>' not in m.content %}<think></think>{{ m.content }}"
    "{% elif m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}<|end|>{% endfor %}"
)


def test_words_are_found_in_templates_of_every_kind(tokenizer):
    assert said(tokenizer, dialogue("the cat", "system"), DEFAULT_SYSTEM) == [
        ("user", "the cat"), ("assistant", "system"),
    ]  # fmt: skip
    assert said(tokenizer, dialogue("x", "y", "x", "y", system="x"), SYSTEM_INSIDE) == [
        ("system", "x"), ("user", "x"), ("assistant", "y"), ("user", "x"), ("assistant", "y"),
    ]  # fmt: skip
    thinking = dialogue("one", "<think>a</think>two", "three", "<think>b</think>four")
    assert said(tokenizer, thinking, THOUGHTS) == [
        ("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "<think>b</think>four"),
    ]  # fmt: skip
    assert said(tokenizer, dialogue("one", "two"), THOUGHTS) == [("user", "one"), ("assistant", "two")]


def test_a_source_reads_dialogues(tokenizer, tmp_path):
    folder = save_llama(tmp_path, tokenizer)
    source = CausalLM(folder, ["model.layers.*"], device="cpu")
    items = [{"messages": dialogue("the cat", "sat"), "sample_id": 0}, {"text": "a dog", "sample_id": 1}]
    read = source.read(source.collate(items))
    assert read["role"].tolist() == [0, 0, 2, 2, 0, 0, 3, 0, -1, -1, -1]
    assert read["kind"].tolist() == [1, 2, 0, 0, 2, 2, 0, 2, 1, 0, 0]  # headers are no words
    names = tokenizer.convert_ids_to_tokens(read["token_id"].tolist())
    assert [token.strip() for token in source.render(items[0])["tokens"]] == names[:8]
    short = CausalLM(folder, ["model.layers.*"], context_length=4, device="cpu")
    assert short.read(short.collate(items))["role"].tolist() == [0, 0, 2, 2, -1, -1, -1]
    pooled = CausalLM(folder, ["model.layers.*"], positions="mean", device="cpu")
    assert "role" not in pooled.read(pooled.collate(items))


def test_a_template_can_be_given_and_a_missing_one_is_told(tmp_path):
    folder = save_llama(tmp_path, word_tokenizer(template=None))
    item = {"messages": dialogue("the cat", "sat"), "sample_id": 0}
    with pytest.raises(MmsaeError, match=r"has no chat template; give the source chat_template="):
        CausalLM(folder, ["model.layers.*"]).collate([item])
    (tmp_path / "chat.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    for given in (str(tmp_path / "chat.jinja"), (tmp_path / "chat.jinja").read_text()):
        ids = CausalLM(folder, ["model.layers.*"], chat_template=given).collate([item])["input_ids"]
        assert ids.shape == (1, 3)
        assert torch.equal(ids, torch.tensor([[9 + WORDS.index(w) for w in ("the", "cat", "sat")]]))
    with pytest.raises(MmsaeError, match="neither a Jinja template nor a file"):
        CausalLM(folder, ["a"], chat_template="no.jinja")
    strict = CausalLM(folder, ["a"], chat_template="{{ raise_exception('no users') }}")
    with pytest.raises(MmsaeError, match=r"the chat template refuses a dialogue \(no users\)"):
        strict.collate([item])
