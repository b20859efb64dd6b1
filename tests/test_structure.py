"""The house itself: doors, layers, and what may be imported when."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "genkit"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)
# Bottom to top: a folder may import itself and what stands on a line above it, never what stands beside or below it.
LAYERS = (
    ("kernels",),
    ("octree", "meshes"),
    ("nn",),
    ("mixers",),
    ("backbones", "tokenizers"),
    ("samplers", "reuse", "data"),
    ("metrics",),
    ("objectives", "conditions"),
)
RANK = {folder: rank for rank, folders in enumerate(LAYERS) for folder in folders}
# What stands above all parts. (`genkit.pipeline` and `genkit.registry` are reached through words, not through imports.)
TOP = {
    "cli", "verbs", "training", "sampling", "evaluation", "quickstart", "caching", "coding", "launch", "show", "bench",
    "importing", "foreign", "exporting", "job", "snapshots", "shapes", "editing", "starting", "fitting",
}  # fmt: skip


def imports(path: Path) -> set[str]:
    """Every module a file imports anywhere in it, "genkit.config" for `from genkit import config`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports do not say where things are"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if node.module == "genkit" else {node.module or ""}
    return found


def within(path: Path, folder: str) -> bool:
    return path.relative_to(PACKAGE).parts[0] == folder


@pytest.mark.parametrize("name", ["tokenizers", "samplers", "kernels", "configs"])
def test_doors_lead_into_the_package(name):
    door = ROOT / name
    assert door.is_symlink()
    assert not door.readlink().is_absolute()
    assert door.resolve() == (PACKAGE / name).resolve()


def test_no_folder_of_the_package_is_a_regular_package():
    # A top-level folder `tokenizers` or `kernels` with an __init__.py would hide the installed packages of these names.
    assert [path for path in FILES if path.name == "__init__.py"] == [PACKAGE / "__init__.py"]


@pytest.mark.parametrize("folder", ["genkit", "tests", "scripts", "benchmarks"])
def test_nothing_imports_through_a_door(folder):
    for path in (ROOT / folder).rglob("*.py"):
        heads = {name.partition(".")[0] for name in imports(path)}
        assert not heads & {"tokenizers", "samplers", "kernels", "configs"}, path


def test_imports_point_down():
    for path in FILES:
        here = path.relative_to(PACKAGE).parts[0]
        if here not in RANK:
            continue
        for name in imports(path):
            if not name.startswith("genkit."):
                continue
            there = name.split(".")[1]
            assert there not in TOP, f"{path} imports {name}"
            if there in RANK and there != here:
                assert RANK[there] < RANK[here], f"{path} imports {name}"


def test_tokenizers_and_backbones_do_not_know_each_other():
    for one, other in (("tokenizers", "backbones"), ("backbones", "tokenizers")):
        for path in FILES:
            if within(path, one):
                assert not any(name.startswith(f"genkit.{other}") for name in imports(path)), path


def test_samplers_know_only_what_they_are_called_with():
    allowed = {"torch", "einops", *sys.stdlib_module_names}
    for path in FILES:
        if within(path, "samplers"):
            for name in imports(path):
                own = name.startswith(("genkit.interfaces", "genkit.rng", "genkit.errors", "genkit.samplers"))
                assert own or name.partition(".")[0] in allowed, f"{path} imports {name}"


def test_only_the_command_line_imports_importers():
    for path in FILES:
        if not within(path, "importers") and path.name != "cli.py":
            assert not any(name.startswith("genkit.importers") for name in imports(path)), path


def test_nobody_imports_the_command_line():
    for path in FILES:
        if path.name not in ("cli.py", "__main__.py"):
            assert "genkit.cli" not in imports(path), path


@pytest.mark.parametrize(
    "code",
    [
        "import genkit",
        "from genkit import __version__",
        "from genkit.cli import main; main(['--help'])",
        "from genkit.cli import main; main(['train', '--help'])",
        "from genkit.cli import main; assert main(['trian']) == 2",
        "import genkit.console, genkit.errors, genkit.optional",
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(code):
    heavy = ("torch", "diffusers", "numpy", "pydantic", "yaml", "PIL", "accelerate", "tqdm")
    program = f"{code}\nimport sys\nprint('imported:', *[name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[-1] == "imported:"


def test_looking_at_runs_and_recipes_needs_no_torch(tmp_path):
    program = "from genkit.cli import main; import sys; main(['ls']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[-1] == "False"


RECIPES = sorted((PACKAGE / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_every_recipe_is_accepted_and_says_what_it_is(path, capsys):
    from genkit.cli import main

    assert main(["config", "check", str(path)]) == 0, capsys.readouterr().err
    assert path.read_text().startswith("# "), "the first line is what `genkit ls recipes` prints"


def test_no_registry_host_is_named():
    # Where packages come from is the machine's setting, not the project's.
    for path in [ROOT / "pyproject.toml", *(ROOT / "scripts").iterdir()]:
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            assert "index-url" not in text
            assert "https://" not in text, path
