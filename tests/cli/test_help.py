import subprocess
import sys
from pathlib import Path

import pytest

from mmsae.cli.main import VERBS, help_text, main


def test_help_starts_without_torch():
    code = "import sys; from mmsae.cli.main import main; main(['--help'])"
    code += "; print(sorted({'torch', 'lightning', 'jsonargparse'} & set(sys.modules)))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.endswith("[]\n")
    assert all(verb in said for verb in VERBS)
    assert max(map(len, help_text().splitlines())) <= 80


def told(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    assert stop.value.code in (0, None)
    return capsys.readouterr().out


def test_help_of_fit_is_short_and_ours_comes_first(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    said = told(capsys, "fit", "--help")
    assert len(said.splitlines()) < 150
    assert max(map(len, said.splitlines())) <= 85  # titles are not wrapped
    places = [said.index(f"  --{name} ") for name in ("model.core", "data", "resume", "trainer.max_steps")]
    assert places == sorted(places)
    assert "--trainer.barebones" not in said


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("--model.core.help=TopK", "--model.core.d_latent"),
        ("--data.help=Scenes", "--data.n_train"),
        ("--data.source.help=OpenCLIP", "source.hook_points"),
    ],
)
def test_help_of_a_class(capsys, word, said):
    assert said in told(capsys, "fit", word)


def test_a_strangers_datamodules_is_named(tmp_path):
    (tmp_path / "datamodules").mkdir()
    (tmp_path / "datamodules" / "__init__.py").write_text("")
    done = subprocess.run([sys.executable, "-m", "mmsae", "fit"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert str(Path(tmp_path) / "datamodules") in done.stderr
    assert "stands in the way" in done.stderr
