import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import mmsae
from mmsae.cli.main import main
from mmsae.cores import TopK
from mmsae.store import CodeStore, Store

FAST = ["--threads=1", "--accelerator=cpu"]


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_encode_writes_what_the_dictionary_gives_and_evaluate_reads_it(fit, store, capsys, monkeypatch):
    run = fit(steps=5)
    capsys.readouterr()
    main(["encode", f"--run={run}", "--split=all", "--rows_per_shard=500", *FAST])
    said = capsys.readouterr()
    assert said.out.splitlines()[-2] == f"codes: {run}/codes/test (600 rows, 4.0 codes each)"
    assert said.out.splitlines()[-1] == f"next:  mmsae evaluate --run {run} --codes {run}/codes"
    assert "encoding test" in said.err
    core, rows = mmsae.load(run), Store(store / "test")
    x = torch.cat([batch["acts"]["x"] for batch in rows.in_order(128)])
    codes = CodeStore(run / "codes" / "test", verify="checksum")
    with torch.no_grad():
        assert torch.allclose(codes[:].dense(), core.encode(x).dense(), rtol=1e-4, atol=1e-5)
    assert len(CodeStore(run / "codes" / "train")) == 4096
    assert codes.columns["sample_id"].tolist() == list(range(600))
    assert (run / "codes" / "test" / "top_16.safetensors").is_file()
    main(["evaluate", f"--run={run}", "--threads=1"])
    live = json.loads((run / "results.json").read_text())
    calls, encode = [], TopK.encode
    monkeypatch.setattr(TopK, "encode", lambda self, *given: calls.append(len(given[0])) or encode(self, *given))
    main(["evaluate", f"--run={run}", f"--codes={run}/codes", "--threads=1"])
    stored = json.loads((run / "results.json").read_text())
    assert np.allclose(list(stored["Fidelity"].values()), list(live["Fidelity"].values()))
    assert sum(calls) == 2 * 600  # once for the reconstruction, once for the norms (of at most 20,000 rows)


def test_an_interrupted_encoding_goes_on_where_it_stopped(fit, monkeypatch):
    run = fit(steps=5)
    words = ["encode", f"--run={run}", "--rows_per_shard=100", *FAST]
    main([*words, "--out=whole"])
    encode, calls = TopK.encode, []

    def broken(self, *given):
        calls.append(len(given[0]))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(self, *given)

    monkeypatch.setattr(TopK, "encode", broken)
    with pytest.raises(SystemExit):
        main([*words, "--out=again"])
    assert not (Path("again") / "test" / "manifest.json").is_file()
    calls[:] = [0] * 4
    main([*words, "--out=again"])
    assert sum(calls[4:]) < 600
    assert bytes_of(Path("again/test")) == bytes_of(Path("whole/test"))
    calls[:] = [0] * 4
    main([*words, "--out=again"])  # nothing is left to do
    assert sum(calls) == 0


def test_codes_of_another_dictionary_or_other_data_are_refused(fit, refused, store, wide, tmp_path):
    run, other = fit(steps=5), fit(steps=6)
    assert "no code store at" in refused("evaluate", f"--run={run}", "--codes=nix")
    main(["encode", f"--run={run}", "--out=codes", "--n_top=0", *FAST])
    assert not list(Path("codes/test").glob("top*"))
    assert "holds codes of another dictionary (TopK " in refused("evaluate", f"--run={other}", "--codes=codes")
    said = refused("encode", f"--run={other}", "--out=codes", *FAST)
    assert "begun with another dictionary" in said
    moved = Path(shutil.copytree(store, tmp_path / "moved"))
    manifest = json.loads((moved / "test" / "manifest.json").read_text())
    (moved / "test" / "manifest.json").write_text(json.dumps(manifest | {"data": {"class": "other"}}))
    said = refused("evaluate", f"--run={run}", "--codes=codes", f"--store={moved}")
    assert "codes of other data" in said
    assert "d_in=32" in refused("encode", f"--run={run}", f"--store={wide}", *FAST)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--split=tset"], "--split=tset is none of"),
        (["--dtype=int8"], "--dtype=int8 is none of"),
        (["--rows_per_shard=0"], "rows_per_shard=0 is out of range"),
        (["--n_top=-1"], "n_top=-1 is out of range"),
        (["--accelerator=cup"], "--accelerator, --devices: "),
        (["--owt=x"], "there is no option 'owt'; nearest: out"),
        (["--sae=nix"], "nix does not exist"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_settings_that_do_not_fit(fit, refused, more, said):
    run = fit(steps=1)
    assert said in refused("encode", f"--run={run}", *FAST, *more)


def test_no_run(refused):
    assert "is no run of mmsae fit" in refused("encode", "--run=nix", *FAST)
