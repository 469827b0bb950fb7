"""dictionary_learning (version 0.1): `config.json` beside the state dict `ae.pt`, checkpoints `ae_{step}.pt` below."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mmsae
from mmsae.artifact import write_folder
from mmsae.cores import BatchTopK, Gated, JumpReLU, LinearCore, Matryoshka, MultiTopK, PAnneal, ReLU, SAECore, TopK
from mmsae.errors import MmsaeError, nearest
from mmsae.formats.tensors import (
    Answer,
    as_float32,
    check_tensors,
    fill,
    has_threshold,
    read_json,
    read_pickle,
    tensors_of,
    two_dimensional,
    unit_rows,
)
from mmsae.spec import TARGET

CONFIG = "config.json"
WEIGHTS = "ae.pt"
PACKAGE = "dictionary-learning"

LINEAR = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec"}
PLAIN = {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
NAMES: dict[str, dict[str, str]] = {
    "AutoEncoder": {**LINEAR, "bias": "b_dec"},
    "AutoEncoderNew": {**LINEAR, "decoder.bias": "b_dec"},
    "GatedAutoEncoder": {
        "encoder.weight": "W_enc", "gate_bias": "b_enc", "decoder.weight": "W_dec", "decoder_bias": "b_dec",
        "r_mag": "r_mag", "mag_bias": "b_mag",
    },
    "AutoEncoderTopK": {**LINEAR, "b_dec": "b_dec"},
    "BatchTopKSAE": {**LINEAR, "b_dec": "b_dec", "threshold": "threshold"},
    "MatryoshkaBatchTopKSAE": {**PLAIN, "threshold": "threshold"},
    "JumpReluAutoEncoder": {**PLAIN, "threshold": "threshold"},
}  # fmt: skip
"""Their classes, and our names of their tensors; those called `*.weight` are transposed."""
BUFFERS = {
    "AutoEncoderTopK": {"k", "threshold"}, "BatchTopKSAE": {"k"}, "MatryoshkaBatchTopKSAE": {"k", "group_sizes"}
}  # fmt: skip
"""What else their state dicts hold."""
UNCENTRED = ("AutoEncoderNew", "JumpReluAutoEncoder")

WRITTEN: dict[type[SAECore], tuple[str, str]] = {
    ReLU: ("AutoEncoderNew", "StandardTrainerAprilUpdate"),  # loading an AutoEncoder would change the codes' unit
    PAnneal: ("AutoEncoderNew", "PAnnealTrainer"),
    Gated: ("GatedAutoEncoder", "GatedSAETrainer"),
    TopK: ("AutoEncoderTopK", "TopKTrainer"),
    MultiTopK: ("AutoEncoderTopK", "TopKTrainer"),
    BatchTopK: ("BatchTopKSAE", "BatchTopKTrainer"),
    Matryoshka: ("MatryoshkaBatchTopKSAE", "MatryoshkaBatchTopKTrainer"),
    JumpReLU: ("JumpReluAutoEncoder", "JumpReluTrainer"),
}


def recognises(path: Path) -> bool:
    """Whether a folder, or file, is one of dictionary_learning's."""
    return (path / WEIGHTS).is_file() or (path.is_file() and re.fullmatch(r"ae(_\d+)?\.pt", path.name) is not None)


# ---- writing


def export(core: SAECore, folder: str | Path, metadata: dict[str, Any] | None = None) -> Path:
    """Write a dictionary so that `dictionary_learning.utils.load_dictionary` reads it; encode and decode then agree.

    Args:
        core: A folded core of one of the classes in `WRITTEN`, no transcoder: it takes raw activations.
        folder: Where to; an older export there is replaced.
        metadata: `model_name` and `hook_name` become `lm_name` and `submodule_name`.

    Raises:
        MmsaeError: dictionary_learning has no such dictionary, or it has no threshold yet.
    """
    names = WRITTEN.get(type(core))  # the exact class: a subclass may select in another way
    if names is None or TARGET in core.spec.streams:
        what = f"{type(core).__name__}{' transcoder' if TARGET in core.spec.streams else ''}"
        raise MmsaeError(
            f"dictionary_learning has no class for a {what}; it takes {', '.join(c.__name__ for c in WRITTEN)}, "
            "and no transcoders: choose another format."
        )
    assert isinstance(core, LinearCore)
    has_threshold(core)
    ours = as_float32(tensors_of(core, centred=names[0] not in UNCENTRED))
    state = {theirs: ours[name] for theirs, name in NAMES[names[0]].items()}
    state = {name: t.t().contiguous() if name.endswith(".weight") else t for name, t in state.items()}
    metadata = metadata or {}
    trainer: dict[str, Any] = {
        "dict_class": names[0],
        "trainer_class": names[1],
        "activation_dim": core.spec.d_in,
        "dict_size": core.d_latent,
        "layer": metadata.get("hook_layer"),
        "lm_name": metadata.get("model_name"),
        "submodule_name": metadata.get("hook_name"),
        "exported_by": f"mmsae {mmsae.__version__} ({type(core).__name__})",
    }
    if isinstance(core, TopK):
        trainer["k"] = core.k
        state["k"] = torch.tensor(core.k, dtype=torch.int32)
        state.setdefault("threshold", torch.tensor(-1.0))
    if isinstance(core, Matryoshka):
        sizes = core.prefix_ends.cpu().diff(prepend=torch.zeros(1, dtype=torch.int64))
        state["group_sizes"], trainer["group_sizes"] = sizes, sizes.tolist()
    data = io.BytesIO()
    torch.save(state, data)
    config = json.dumps({"trainer": trainer, "buffer": {"d_submodule": core.spec.d_in}}, indent=1)
    return write_folder(Path(folder), {WEIGHTS: data.getvalue(), CONFIG: config.encode()}, mark=CONFIG)


# ---- reading


def load(path: str | Path) -> SAECore:
    """A dictionary from a folder, or file, of dictionary_learning, in `eval` mode and float32.

    AutoEncoder (with decoder rows of norm 1, as its own loader gives it) and AutoEncoderNew become ReLU, the others
    Gated, TopK, BatchTopK, Matryoshka and JumpReLU. A backup from the middle of a training is read as well; what
    `norm_factor` it has is folded, as at the end of the training.

    Args:
        path: Folder with `config.json` and `ae.pt`, or a file such as `checkpoints/ae_1000.pt`. Without a config
            beside the file or in the folder above, its tensors tell the class, unless two classes have the same.

    Raises:
        MmsaeError: A file is missing, damaged or no mere state dict, or describes something that has no core here.
    """
    path = Path(path)
    file = path / WEIGHTS if path.is_dir() else path
    state = read_pickle(file)
    backup = isinstance(state.get("ae"), dict)
    trainer = _trainer(file) or (state.get("config") if backup else None)
    name = trainer.get("dict_class") if isinstance(trainer, dict) else _class_of(state["ae"] if backup else state, file)
    if name not in NAMES:
        raise MmsaeError(f"{path} has the dict_class {name!r}; known here: {', '.join(NAMES)}.")
    factor = 1.0
    if backup:
        factor, state = float(state.get("norm_factor") or 1), state["ae"]
    state = dict(state)
    k, sizes = state.pop("k", trainer.get("k") if isinstance(trainer, dict) else None), state.pop("group_sizes", None)
    if name == "AutoEncoderTopK":
        state.pop("threshold", None)  # only used when asked for
    tensors = _tensors(state, name, file)
    for tensor in ("b_enc", "b_dec", "b_mag", "threshold"):
        if tensor in tensors and (tensor != "threshold" or name == "JumpReluAutoEncoder" or tensors[tensor] >= 0):
            tensors[tensor] = tensors[tensor] * factor
    norms = tensors["W_dec"].norm(dim=-1)
    if name == "AutoEncoder" and not torch.allclose(norms, torch.ones_like(norms)):  # by the same test as theirs
        unit_rows(tensors)
    d_in, d_latent = tensors["W_enc"].shape
    core = _build(name, d_in, d_latent, k, sizes, file)
    return fill(core, tensors, centred=name not in UNCENTRED)


def _trainer(file: Path) -> dict[str, Any] | None:
    """What the config says about the trainer; None if there is none."""
    found = (folder / CONFIG for folder in (file.parent, file.parent.parent) if (folder / CONFIG).is_file())
    config = next(found, None)
    return read_json(config, "dictionary_learning").get("trainer", {}) if config else None


def _class_of(state: dict[str, Any], file: Path) -> str:
    """The class that has these tensors."""
    fitting = [name for name, names in NAMES.items() if {*names, *BUFFERS.get(name, ())} == set(state)]
    if len(fitting) != 1:
        which = f"of {' or '.join(fitting)}" if fitting else f"of no class known here ({nearest('', state)})"
        raise MmsaeError(f"{file} has tensors {which}, and there is no {CONFIG} beside or above it: put it there.")
    return fitting[0]


def about(path: Path) -> dict[str, Any]:
    """`model_name` and `hook_name`, as far as the config tells."""
    trainer = _trainer(path / WEIGHTS if path.is_dir() else path) or {}
    found = {"model_name": trainer.get("lm_name"), "hook_name": trainer.get("submodule_name")}
    return {key: value for key, value in found.items() if value}


def _tensors(state: dict[str, Any], name: str, file: Path) -> dict[str, Tensor]:
    """Checked, in float64, under our names and in the orientation that `fill` takes."""
    names = NAMES[name]
    theirs = next(t for t, ours in names.items() if ours == "W_enc")
    shape = two_dimensional(state, theirs, file)
    d_in, d_latent = shape[::-1] if theirs.endswith(".weight") else shape
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (d_in, d_latent), "W_dec": (d_latent, d_in), "b_dec": (d_in,),
        "threshold": (d_latent,) if name == "JumpReluAutoEncoder" else (),
    }  # fmt: skip
    wanted = {theirs: shapes.get(ours, (d_latent,)) for theirs, ours in names.items()}
    wanted = {theirs: size[::-1] if theirs.endswith(".weight") else size for theirs, size in wanted.items()}
    found = check_tensors(state, wanted, file, f"the dict_class {name!r}")
    return {ours: found[t].t() if t.endswith(".weight") else found[t] for t, ours in names.items()}


def _build(name: str, d_in: int, d_latent: int, k: Any, sizes: Any, file: Path) -> LinearCore:
    if name in ("AutoEncoder", "AutoEncoderNew"):
        return ReLU(d_in, d_latent)
    if name == "GatedAutoEncoder":
        return Gated(d_in, d_latent)
    if name == "JumpReluAutoEncoder":
        return JumpReLU(d_in, d_latent, target_l0=min(32, d_latent))
    try:
        k = int(k)
        prefixes = [end / d_latent for end in torch.as_tensor(sizes).cumsum(0).tolist()] if "Matry" in name else []
    except (TypeError, ValueError, RuntimeError) as error:
        raise MmsaeError(f"{file} does not say how many latents fire, or how they are grouped ({error}).") from error
    if name == "AutoEncoderTopK":
        return TopK(d_in, d_latent, k)
    return BatchTopK(d_in, d_latent, k) if name == "BatchTopKSAE" else Matryoshka(d_in, d_latent, k, prefixes)


def ask(folder: Path) -> Answer:
    """What dictionary_learning itself makes of a folder.

    Raises:
        ImportError: It is not installed.
    """
    from dictionary_learning.utils import load_dictionary

    theirs, _ = load_dictionary(str(folder), device="cpu")

    def answer(x: Tensor) -> tuple[Tensor, Tensor]:
        codes = theirs.encode(x)
        return codes, theirs.decode(codes)

    return answer
