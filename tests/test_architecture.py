"""Who imports whom (architecture.md, section 2), read from the source."""

import ast
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "mmsae").rglob("*.py"), *(ROOT / "datamodules").rglob("*.py")])

# room: rooms it may import beside itself. `subclasses`, `layout` and `containers` are small shared modules on top.
TOP = {"errors", "files", "spec", "codes", "kernels", "subclasses", "layout", "containers", "results"}
CORES, HOOKS = TOP | {"cores"}, TOP | {"hooks"}
MODELS, NUMBERS = {"sources", "miniatures", "encoders", "store"}, {"latents", "metrics"}
MAY = {
    **dict.fromkeys(TOP, TOP),
    "cores": TOP,
    "hooks": TOP,
    "sources": HOOKS,
    "miniatures": HOOKS,
    "encoders": {"errors"},
    "store": TOP,
    "artifact": CORES,
    "formats": CORES | {"artifact"},
    "latents": CORES | {"store"},
    "metrics": CORES,
    "training": CORES | {"artifact", "store", "metrics"},
    "datamodules": TOP | {"sources", "store", "miniatures"},
    **dict.fromkeys(("steering", "analyses", "explain"), CORES | HOOKS | MODELS | {"artifact", "formats"} | NUMBERS),
    "report": {"errors", "files", "results"},
    "cli": {"*"},
}
INSIDE = {"sources": {"miniatures", "encoders"}}  # and inside functions: what ships is built like any other weights
LIGHTNING = {"training", "datamodules", "cli", "encoders"}
GUESTS = {  # optional: inside functions
    "transformers", "open_clip", "timm", "diffusers", "torchvision", "sae_lens", "wfdb", "mne", "braindecode",
}  # fmt: skip
HEAVY = ("torch", "lightning", "numpy", "sklearn")


class Import(NamedTuple):
    """One imported module."""

    module: str
    inside: bool  # a function
    typing: bool  # under `if TYPE_CHECKING`
    line: int


def imports_of(path):
    found = []

    def visit(node, inside, typing):
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, inside, typing, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            found.extend(Import(f"{node.module}.{alias.name}", inside, typing, node.lineno) for alias in node.names)
        inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            guard = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test) and child in node.body
            visit(child, inside, typing or guard)

    visit(ast.parse(path.read_text()), False, False)
    return found


def room_of(module):
    """The room of a dotted name; the empty string for the package itself, None for others'."""
    parts = module.split(".")
    if parts[0] == "datamodules":
        return "datamodules"
    if parts[0] != "mmsae":
        return None
    rooms = {p.stem for p in (ROOT / "mmsae").iterdir()} - {"__init__"}
    return parts[1] if len(parts) > 1 and parts[1] in rooms else ""


def room_of_file(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "datamodules" if parts[0] == "datamodules" else "" if parts[1] == "__init__" else parts[1]


def name(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=name)
def test_only_rooms_above_are_imported(path):
    room = room_of_file(path)
    if room in ("", "__main__"):  # looks its few names up on first use
        return
    assert room in MAY, f"{name(path)}: a new room; say in this test and in architecture.md whom it may import"
    for found in imports_of(path):
        other = room_of(found.module)
        if other in (None, "", room) or "*" in MAY[room]:
            continue
        if found.typing:  # a name for the type checker alone is no dependence
            continue
        allowed = MAY[room] | (INSIDE.get(room, set()) if found.inside else set())
        fine = other in allowed or any(found.module.startswith(f"mmsae.{one}.") for one in allowed if "." in one)
        where = " inside a function" if found.inside else ""
        assert fine, f"{name(path)}:{found.line} imports {found.module}{where}, which is below {room}"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_guests_stay_in_their_rooms(path):
    room = room_of_file(path)
    for found in imports_of(path):
        top = found.module.split(".")[0]
        at = f"{name(path)}:{found.line} imports {found.module}"
        if top in ("lightning", "pytorch_lightning") and not found.typing:
            assert room in LIGHTNING, f"{at}: lightning is seen by {', '.join(sorted(LIGHTNING))} alone"
        if top in GUESTS and not found.typing:
            assert found.inside, f"{at} at its top: optional libraries are imported inside functions"
        if room == "report" and not found.typing:
            assert top not in ("torch", "lightning", "transformers"), f"{at}: a report is drawn from files"
        if room_of(found.module) == "cli":
            assert room in ("cli", "__main__"), f"{at}: nobody imports the command line"


def loaded_by(statement):
    script = f"import sys; {statement}; print(*sorted(m for m in sys.modules if '.' not in m))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement", ["import mmsae", "from mmsae.cli.main import main; main(['--help'])", "import mmsae.errors"]
)
def test_importing_loads_nothing_heavy(statement):
    assert loaded_by(statement).isdisjoint(HEAVY)


def test_importing_the_report_loads_no_torch():
    modules = [p.stem for p in (ROOT / "mmsae" / "report").glob("*.py") if p.stem != "__init__"]
    assert "torch" not in loaded_by("import " + ", ".join(f"mmsae.report.{m}" for m in modules))


@pytest.mark.parametrize("path", FILES, ids=name)
def test_a_file_has_the_length_of_an_idea(path):
    assert len(path.read_text().splitlines()) < 500


@pytest.mark.parametrize("path", FILES, ids=name)
def test_what_is_public_is_explained(path):
    tree = ast.parse(path.read_text())
    if tree.body:
        assert ast.get_docstring(tree), f"{name(path)} has no first line that says what it is"

    def visit(node, owner):
        for child in node.body:
            if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            setter = any(isinstance(d, ast.Attribute) and d.attr == "setter" for d in child.decorator_list)
            if not child.name.startswith("_") and not setter:
                assert ast.get_docstring(child), f"{name(path)}:{child.lineno} {owner}{child.name} has no docstring"
            if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
                visit(child, f"{child.name}.")

    visit(tree, "")


def test_the_rules_would_notice(tmp_path):
    """The reader sees imports at the top, in functions, and for the type checker apart."""
    file = tmp_path / "x.py"
    file.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import mmsae.cli\n"
        "def f():\n    from mmsae.training import module\nimport torch\n"
    )
    found = {i.module: (i.inside, i.typing) for i in imports_of(file)}
    assert found["mmsae.cli"] == (False, True)
    assert found["mmsae.training.module"] == (True, False)
    assert found["torch"] == (False, False)
    assert room_of("mmsae.training.module") == "training"
    assert room_of("mmsae") == ""
