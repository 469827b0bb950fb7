from pathlib import Path

import pytest

TOPK = ["--model.core=TopK", "--model.core.d_latent=64", "--model.core.k=4"]

STORED = ["--data=Stored", "--data.store=x"]
SCENES = ["--data=Scenes", "--data.source=OpenCLIP"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model.core=TopKK", *STORED], "--model.core=TopKK: no SAECore is called so; nearest: TopK"),
        ([*TOPK, "--data=Scene"], "--data=Scene: no ActivationDataModule is called so; nearest: Scenes"),
        ([*TOPK, "--data=Scenes", "--data.source=OpenCLIPP"], "OpenCLIPP: no Source is called so; nearest: OpenCLIP"),
        ([*TOPK, *STORED, "--model.also={a: TopKK}"], "--model.also=TopKK: no SAECore is called so; nearest: TopK"),
        ([*TOPK, *STORED, "--model.optimizer=Adm"], "--model.optimizer=Adm: no Optimizer is called so; nearest: Adam"),
        (["--model.core=collections.OrderedDict", *STORED], "--model.core=collections.OrderedDict is no class"),
        (["--model.core=nofile.MyCore", *STORED], "cannot be imported (No module named 'nofile')"),
        ([*TOPK, *STORED, "--model.core.kk=3"], "TopK has no option 'kk'; nearest: k."),
        ([*TOPK, *SCENES, "--data.source.modle=3"], "OpenCLIP has no option 'modle'; nearest: model."),
        ([*TOPK, "--data=Scenes", "--data.n_trian=3"], "Scenes has no option 'n_trian'; nearest: n_train"),
        ([*TOPK, *STORED, "--model.optimizer=Adam", "--model.optimizer.lrr=1"], "Adam has no option 'lrr'; near"),
        ([*TOPK, *STORED, "--model.normalize=none"], "no option 'model.normalize'; nearest: model.normalise"),
        ([*TOPK, *STORED, "--modle.core=TopK"], "no option 'modle.core'; nearest: model.core"),
        ([*TOPK, *STORED, "--trainer.max_stepz=3"], "no option 'trainer.max_stepz'; nearest: trainer.max_steps"),
        ([*TOPK, *STORED, "--model.core.d_in=99"], "--model.core.d_in cannot be set: the data decide"),
        ([*TOPK, *STORED, "--model.spec=99"], "--model.spec cannot be set: the data decide"),
        ([*TOPK, *STORED, "--model.core.k=abc"], "--model.core.k=abc is not of type int."),
        ([*TOPK, *STORED, "--data.batch_size=abc"], "--data.batch_size=abc is not of type int."),
        ([*TOPK, *STORED, "--trainer.max_steps=abc"], "--trainer.max_steps=abc is not of type int."),
        ([*TOPK, *STORED, "--threads=x"], "--threads=x is not of type int or null."),
        ([*TOPK, *STORED, "--data.columns=3"], "--data.columns=3 is not of type list[str] or null."),
        ([*TOPK, *STORED, "--model.normalise=foo"], "--model.normalise=foo is none of 'none', 'center'"),
        (["--config=nofile.yaml"], "there is no file"),
        (TOPK, "give --data ("),
        (STORED, "give --model.core (AbsTopK"),
        (["--model.core=TopK", *STORED], "TopK needs --model.core.d_latent."),
        ([*TOPK, *SCENES, "--data.source.hook_points=[a]"], "OpenCLIP needs --data.source.model."),
        ([*TOPK, "--data.n_train=3"], "name the class before its options: --data=NAME ("),
        (["--model.core.k=3", *STORED], "name the class before its options: --model.core=NAME (AbsTopK"),
        ([*TOPK, *STORED, "stray"], "'stray' is no option"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_wrong_word_is_one_sentence(refused, words, said):
    assert said in refused("fit", *words)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model:\n  core:\n    class_path: TopKK\n", "bad.yaml: --model.core=TopKK: no SAECore is called so"),
        ("model: {core: {class_path: TopK, init_args: {kk: 3}}}", "bad.yaml: TopK has no option 'kk'; nearest: k"),
        ("model: {core: {class_path: TopK, init_args: {k: abc}}}", "bad.yaml: --model.core.k=abc is not of type int"),
        ("data: {class_path: Scenes, init_args: {source: {class_path: Tim}}}", "--data.source=Tim: no Source"),
        ("data: {class_path: Scenes, init_args: {n_trian: 3}}", "bad.yaml: Scenes has no option 'n_trian'; near"),
        ("modle:\n  core: TopK\n", "no option 'modle.core'; nearest: model.core"),
        ("a: [1, 2\nb: }\n", "bad.yaml: this is no YAML"),
    ],
)
def test_a_wrong_file_is_one_sentence_that_names_it(refused, text, said):
    Path("bad.yaml").write_text(text)
    assert said in refused("fit", "--config=bad.yaml")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fitt"], "there is no such verb; nearest: fit"),
        (["evaluate"], "give --run."),
        (["evaluate", "--runn=x"], "no option 'runn'; nearest: run."),
        (["evaluate", "--run=x", "--analyses+=Fidelty"], "--analyses=Fidelty: no Analysis is called so; nearest: Fid"),
        (["evaluate", "--run=nix"], "nix is no run of mmsae fit"),
        (["report", "--run=nix"], "nix has no results to draw"),
        (["convert", "--sae=./nix", "--out=y"], "nix does not exist"),
        (["convert", "--sae=./nix", "--out=y", "--to=foo"], "--to=foo is none of 'saelens', 'sparsify'"),
        (["extract", "--model.out=x", "--data=Scnes"], "no ActivationDataModule is called so; nearest: Scenes"),
        (["extract", "--model.out=x", "--data=Scenes"], "Scenes needs activations: give --data.source"),
        (["validate", *TOPK, *STORED], "give --ckpt_path"),
        (["fit", "--resume", "nix"], "--resume nix is no run"),
        (["fit", *TOPK, *STORED, "--ckpt_path=last"], "would look into the new, empty run"),
        (["fit", *TOPK, *STORED, "--ckpt_path=nix.ckpt"], "ckpt_path=nix.ckpt does not exist"),
    ],
)
def test_other_verbs(refused, words, said):
    assert said in refused(*words)
