"""Sets of real meshes that others publish, brought into a folder at a user's request; nothing of them comes with genkit."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from genkit import files
from genkit.console import Progress
from genkit.errors import GenkitError, UsageError
from genkit.meshes import storage
from genkit.meshes.mesh import Mesh

SETS = ("sweethome3d",)
_PACKAGE = "sweethome3d-furniture"
_INSTALLED = Path("/usr/share/sweethome3d/furniture")
# Class -> words in a model's name; the first that fits counts, then the model's category.
_CLASSES = {
    "chair": ("chair", "stool", "bench"),
    "sofa": ("sofa", "couch"),
    "table": ("table", "desk"),
    "lamp": ("lamp", "light", "chandelier", "lantern"),
    "bed": ("bed", "crib"),
    "shelf": ("bookcase", "shelf", "shelve", "cabinet", "wardrobe", "dresser", "chest", "sideboard"),
    "door": ("door",),
    "window": ("window",),
    "vase": ("vase", "bottle", "pot", "mug", "cup", "jar"),
    "car": ("car", "truck", "van", "bus"),
}


def fetch(name: str, out: str | None = None) -> dict[str, Any]:
    """Bring a set of meshes into a folder, subfolders as classes, each as PLY, with a table of who made what under which licence.

    sweethome3d: some 820 models of furniture (CC-BY 3.0 and CC0), from the Debian package sweethome3d-furniture: where it is installed, else fetched by
    apt-get (120 MB) and unpacked without installing it. Turned upright and brought to the proportions its catalogue names, in metres.

    Returns: plain data: "out", "models", "classes" {name: count}, "left_out" [{"model", "reason"}], "attribution".
    Raises: UsageError for an unknown set or a folder that holds something else; GenkitError when the package cannot be had.
    """
    if name not in SETS:
        raise UsageError(f"no set of meshes is called {name}; known: {', '.join(SETS)}")
    folder = Path(out or f"data/{name}")
    if folder.exists() and any(folder.iterdir()) and not (folder / "ATTRIBUTION.md").exists():
        raise UsageError(f"{folder} holds something else; name another folder with -o")
    with tempfile.TemporaryDirectory() as temporary:
        return _convert(_archives(Path(temporary)), folder)


def _archives(temporary: Path) -> list[Path]:
    """The catalogues of the package. Raises GenkitError saying what to install where it can be had in no way."""
    found = sorted(_INSTALLED.glob("*.sh3f"))
    if found:
        return found
    advice = f"as root: apt-get install {_PACKAGE}, then repeat this"
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise GenkitError(
            f"{_INSTALLED} has no models, and this machine has no apt-get to fetch {_PACKAGE} with; {advice}"
        )
    for command in (["apt-get", "download", _PACKAGE], ["dpkg-deb", "-x", f"{_PACKAGE}.deb", "unpacked"]):
        if command[0] == "dpkg-deb":
            command[2] = str(next(temporary.glob("*.deb"), temporary / command[2]))
        done = subprocess.run(command, cwd=temporary, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
            raise GenkitError(f"{' '.join(command[:2])} failed ({reason}); {advice}")
    found = sorted(temporary.rglob("*.sh3f"))
    if not found:
        raise GenkitError(f"the package {_PACKAGE} holds no catalogue of models (*.sh3f)")
    return found


def _convert(archives: list[Path], folder: Path) -> dict[str, Any]:
    left_out: list[dict[str, str]] = []
    rows: list[tuple[str, str, str, str]] = []
    licences: dict[str, str] = {}
    catalogues = [(path, _catalogue(path)) for path in archives]
    total = sum(len(models) for _, (_, models) in catalogues)
    taken: Counter[str] = Counter()
    with Progress(total=total, unit="models", title="fetch") as progress:
        for path, (about, models) in catalogues:
            licences[path.stem] = about.get("license", "see the catalogue")
            with zipfile.ZipFile(path) as archive:
                for model in models:
                    progress.advance(1)
                    try:
                        mesh = _read(archive, model)
                    except (GenkitError, KeyError, ValueError) as error:
                        left_out.append({"model": f"{path.stem}/{model.get('name', '?')}", "reason": str(error)})
                        continue
                    label = class_of(model["name"], model.get("category", ""))
                    stem = re.sub(r"[^a-z0-9]+", "-", model["name"].lower()).strip("-") or "model"
                    taken[f"{label}/{stem}"] += 1
                    number = taken[f"{label}/{stem}"]
                    key = f"{label}/{stem}{f'-{number}' if number > 1 else ''}.ply"
                    storage.save(mesh, folder / key)
                    rows.append((key, model["name"], model.get("creator", "not named"), path.stem))
    lines = [
        "# Who made these models",
        "",
        f"From the Debian package {_PACKAGE}; converted to PLY, without textures, turned and scaled.",
        "",
    ]
    lines += [f"- {name}: {text}" for name, text in sorted(licences.items())]
    lines += ["", "| file | model | creator | catalogue |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in sorted(rows)]
    files.write_text(folder / "ATTRIBUTION.md", "\n".join(lines) + "\n")
    return {
        "out": str(folder),
        "models": len(rows),
        "classes": dict(sorted(Counter(row[0].partition("/")[0] for row in rows).items())),
        "left_out": left_out,
        "attribution": str(folder / "ATTRIBUTION.md"),
    }


def render(found: dict[str, Any]) -> str:
    """The result for people."""
    classes = ", ".join(f"{name} {count}" for name, count in found["classes"].items())
    lines = [
        f"{found['models']:,} models in {found['out']}: {classes}",
        f"who made them, and licences: {found['attribution']}",
    ]
    lines += [f"left out {item['model']}: {item['reason']}" for item in found["left_out"]]
    return "\n".join([*lines, f"next: genkit data prepare {found['out']} repair=true"])


def class_of(name: str, category: str) -> str:
    """A word for what a model is: by its name, else by its category."""
    words = [word.removesuffix("s") for word in re.findall(r"[a-z]+", name.lower())]
    for label, known in _CLASSES.items():
        # "armchair" is a chair; short words must stand alone, or a "cart" would be a car.
        if any(word in known or any(len(k) > 4 and word.endswith(k) for k in known) for word in words):
            return label
    return re.sub(r"[^a-z]+", "-", category.lower()).strip("-") or "other"


def _catalogue(path: Path) -> tuple[dict[str, str], list[dict[str, str]]]:
    """What a catalogue says of itself, and of every model: "key=value" and "key#number=value"."""
    try:
        with zipfile.ZipFile(path) as archive:
            text = archive.read("PluginFurnitureCatalog.properties").decode("latin-1")
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise GenkitError(f"{path} is no catalogue of models ({error})") from None
    about: dict[str, str] = {}
    models: dict[int, dict[str, str]] = {}
    for line in re.sub(r"\\\r?\n\s*", "", text).splitlines():
        found = re.match(r"\s*([A-Za-z]+)(?:#(\d+))?\s*=\s*(.*)", line)
        if not found:
            continue
        value = re.sub(r"\\u([0-9a-fA-F]{4})", lambda code: chr(int(code[1], 16)), found[3]).strip()
        (models.setdefault(int(found[2]), {}) if found[2] else about)[found[1]] = value
    return about, [model for _, model in sorted(models.items()) if "model" in model and "name" in model]


def _read(archive: zipfile.ZipFile, model: dict[str, str]) -> Mesh:
    inside = model["model"].lstrip("/")
    suffix = Path(inside).suffix.lower()
    if suffix not in storage.SUFFIXES:
        raise GenkitError(f"{inside} is of a format that is not read")
    mesh = storage.parse(archive.read(inside), suffix, inside)
    if model.get("modelRotation"):
        turn = torch.tensor([float(number) for number in model["modelRotation"].split()]).reshape(3, 3)
        mesh = Mesh(mesh.vertices @ turn.T, mesh.faces)
    least, greatest = mesh.bounds
    extent = (greatest - least).clamp_min(1e-6)
    wanted = torch.tensor([float(model[side]) for side in ("width", "height", "depth")]) / 100  # metres
    return Mesh((mesh.vertices - (least + greatest) / 2) * (wanted / extent), mesh.faces)
