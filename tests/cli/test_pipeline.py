import json
from pathlib import Path

from mmsae.cli.main import main
from mmsae.store import Store

SOURCE = (
    "{class_path: OpenCLIP, init_args: {model: ViT-B-32, hook_points: [visual.transformer.resblocks.0], device: cpu, "
    "config: {embed_dim: 16, vision_cfg: {image_size: 32, layers: 1, width: 32, patch_size: 16, head_width: 16}, "
    "text_cfg: {context_length: 8, vocab_size: 49408, width: 16, heads: 2, layers: 1}}}}"
)
DATA = ["--data=Scenes", f"--data.source={SOURCE}", "--data.n_train=96", "--data.n_val=48", "--data.n_test=48"]
FAST = ["--threads=1", "--trainer.accelerator=cpu"]
CORE = ["--model.core=TopK", "--model.core.d_latent=64", "--model.core.k=4"]


def test_extract_fit_evaluate_report(capsys):
    main(["extract", *DATA, "--model.out=acts", *FAST])
    said = capsys.readouterr()
    assert said.out.startswith("activations: acts\n")
    assert "extracting train" in said.err
    assert Store(Path("acts/train")).manifest.n_rows == 96 * 5
    main(["extract", *DATA, "--model.out=acts", *FAST])  # nothing is left to do
    main(["fit", *DATA, "--data.store=acts", *CORE, *FAST, "--trainer.max_steps=20", "--data.batch_size=64"])
    main(["evaluate", "--run=runs/version_0", "--threads=1"])
    numbers = json.loads(Path("runs/version_0/results.json").read_text())
    assert "Fidelity" in numbers
    main(["report", "--run=runs/version_0"])
    assert "TopK" in Path("runs/version_0/report.html").read_text()
    main(["convert", "--sae=runs/version_0", "--out=saelens"])
    assert Path("saelens/cfg.json").is_file()


def test_fit_from_the_running_model(capsys):
    sizes = ["--data.batch_size=32", "--data.chunk_rows=128"]
    main(["fit", *DATA, *CORE, *FAST, *sizes, "--trainer.max_steps=10", "--trainer.val_check_interval=5"])
    assert "dictionary: runs/version_0/sae" in capsys.readouterr().out


def test_report_of_a_run_without_examples(fit):
    run = fit(steps=5)
    main(["evaluate", f"--run={run}", "--threads=1"])
    main(["report", f"--run={run}"])
    assert (run / "report.html").is_file()
