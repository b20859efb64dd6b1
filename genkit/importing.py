"""Published weights -> a tokenizer, or a generator on one, as genkit saves it: what `genkit import` does.

An importer is a file of genkit/importers with a function convert(state, config) -> tokenizer or backbone; its name, with dashes, is the word after
--from, its first line says whose weights it reads. Its table IGNORED (pattern of a key -> reason) says what it leaves aside. Beside a backbone's
there is sampling(backbone, config) -> {"objective": ..., "sampler": ..., and where it is not told a class "condition": ...}, how its authors draw from
it, with what the config says of that. Where the original itself can be asked, compare(state, config, module) -> figures for --check; SIZE: pixels per side
of its images. Files are read by genkit.foreign.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genkit.errors import GenkitError, UsageError, nearest
from genkit.foreign import read_config, read_weights

FOLDER = Path(__file__).parent / "importers"
SIZE = 256  # pixels per side of the images that nearly all published tokenizers were trained on


def importers() -> dict[str, str]:
    """Word after --from -> a line about it. Parses the files; imports nothing."""
    found = {}
    for path in sorted(FOLDER.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "convert" for node in tree.body):
            found[path.stem.replace("_", "-")] = (ast.get_docstring(tree) or "").split("\n")[0]
    return found


def import_weights(
    file: str | Path,
    source: str,
    out: str | Path,
    *,
    config: str | Path | Mapping[str, Any] | None = None,
    check: bool = False,
    data: str = "data/images",
    size: int | None = None,
    tokenizer: str | Path | None = None,
) -> dict[str, Any]:
    """Convert a published checkpoint and save it as a pipeline that every verb takes in place of a run.

    Args:
        file: .safetensors, .pt, .pth, .ckpt or .bin, or a folder with such a file and a config.json.
        source: whose weights they are, one of `importers()`.
        out: folder of the pipeline; it must not exist and appears whole or not at all.
        config: options of the original as a YAML or JSON file or a mapping; by default config.json beside the weights.
        check: encode and decode a drawn picture, or draw one in two steps.
        data: folder of images that `genkit eval` reconstructs, or compares with.
        size: pixels per side that `genkit encode` and `eval` bring images to; by default the only ones that the tokenizer takes, what the config
            says, or 256. Of a generator, of the images it draws; by default those it was trained on.
        tokenizer: the run, or the import, of the tokenizer whose latents a generator was trained on; needed for a generator.

    Returns: out; from; tokenizer or backbone (its type); options; parameters, the numbers that were read, codes included; ignored, reason -> keys; left_out,
        names of what else was in the file; check, see `try_out`, or None.

    Raises: UsageError for an unknown source, a missing file, an existing `out`, or a tokenizer that is missing, not needed or of other latents;
        GenkitError for a file that is damaged or does not fit.
    """
    from genkit.pipeline import TokenizerPipeline

    known = importers()
    if source not in known:
        raise UsageError(f"--from {source} is not known; {nearest(source, list(known))}")
    target = Path(out)
    if target.exists():
        raise UsageError(f"{target} exists; choose another folder or remove it")
    weights, left_out = read_weights(Path(file))
    options = _without_nulls(read_config(Path(file), config) or {}) or None
    importer = importlib.import_module(f"genkit.importers.{source.replace('-', '_')}")
    module, drawn = _converted(importer, weights, options, source, file)
    family, kind = type(module).__module__.split(".")[-2:]
    imported = {"from": source, "file": Path(file).name}
    if family == "backbones":
        pipeline, kind_given = generator_of(module, drawn, kind, tokenizer, target.name, data, size)
        pipeline.run_config["imported"] = imported
        checked = try_generator(pipeline) if check else None
        found: dict[str, Any] = {"out": str(target), "from": source, "backbone": kind, "options": kind_given}
    elif tokenizer is not None:
        raise UsageError(f"--tokenizer {tokenizer}: weights of {source} are a tokenizer themselves; leave it out")
    elif hasattr(module, "meshes"):
        given, checked = _options(module, set()), None
        run_config = {
            "name": target.name,
            "data": {"type": "shapes"},
            "tokenizer": {"type": kind, **given},
            "objective": {"type": "shape_reconstruction"},
            "imported": imported,
        }
        pipeline = TokenizerPipeline(module, run_config=run_config)
        found = {"out": str(target), "from": source, "tokenizer": kind, "options": given}
    else:
        usual: int = getattr(importer, "SIZE", SIZE)
        side = size or getattr(module, "image_size", None) or _size(options or {}) or usual
        if side % module.stride:
            raise UsageError(f"--size {side} is no multiple of the tokenizer's stride {module.stride}")
        given, channels = _options(module, {"image_channels"}), module.config["image_channels"]
        checked = try_out(module, channels, side) if check else None
        if checked is not None and hasattr(importer, "compare"):
            checked |= importer.compare(weights, options, module)
        run_config = {
            "name": target.name,
            "data": {"type": "folder", "path": data, "size": side, "channels": channels},
            "tokenizer": {"type": kind, **given},
            "objective": {"type": "reconstruction"},
            "imported": imported,
        }
        pipeline = TokenizerPipeline(module, run_config=run_config)
        found = {"out": str(target), "from": source, "tokenizer": kind, "options": given}
    ignored = _ignored(weights, getattr(importer, "IGNORED", {}))
    unread = {key for keys in ignored.values() for key in keys}
    found |= {
        "parameters": sum(value.numel() for key, value in weights.items() if key not in unread),
        "ignored": ignored,
        "left_out": left_out,
        "check": checked,
    }
    _save(pipeline, target)
    return found


def _converted(
    importer: Any, weights: Mapping[str, Any], options: Mapping[str, Any] | None, source: str, file: str | Path
) -> tuple[Any, Any]:
    """(the network, how its authors draw from it, None of a tokenizer). Raises GenkitError where an importer cannot make sense of what it is given."""
    try:
        module = importer.convert(weights, options)
        return module, importer.sampling(module, options) if hasattr(importer, "sampling") else None
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        told = "" if options is None else ", or an option in the config is not of the kind the original has"
        raise GenkitError(
            f"{file} cannot be read as {source} ({type(error).__name__}: {reason}); it is another model{told}"
        ) from error


def _without_nulls(config: Mapping[str, Any]) -> dict[str, Any]:
    """Options that are null are as good as not there."""
    found = {name: _without_nulls(value) if isinstance(value, Mapping) else value for name, value in config.items()}
    return {name: value for name, value in found.items() if value is not None}


def generator_of(
    backbone: Any,
    sampling: Mapping[str, Any],
    kind: str,
    tokenizer: str | Path | None,
    name: str,
    data: str,
    size: int | None,
) -> tuple[Any, dict[str, Any]]:
    """(pipeline of a backbone on the latents of a tokenizer, the backbone's options). See import_weights."""
    from genkit import config as configs
    from genkit import registry
    from genkit.pipeline import GeneratorPipeline, open_run

    if tokenizer is None:
        raise UsageError(
            "these weights draw latents; give the tokenizer that makes images of them: --tokenizer RUN, for one imported before, such as by diffusers-kl"
        )
    coder = open_run(tokenizer).tokenizer
    for key, told in (
        ("channels", "channels of its latents"),
        ("codebook_size", "codes"),
        ("num_levels", "ids per place"),
        ("patch_sizes", "scales"),
        ("bits", "bits of a code"),
        ("full_depth", "first depth of its split bits"),
        ("code_depth", "depth of its codes"),
    ):
        wanted, found = backbone.config.get(key), getattr(coder, key, None)
        if wanted is not None and (found is None or _plain(found) != _plain(wanted)):
            raise UsageError(f"--tokenizer {tokenizer}: {told}: {found}, this network needs {wanted}")
    if size is not None and size % coder.stride:
        raise UsageError(f"--size {size} is no multiple of the tokenizer's stride {coder.stride}")
    is_of_shapes = hasattr(coder, "meshes")
    trained, num_tokens = tuple(backbone.config.get("grid", (1,))), getattr(coder, "num_tokens", None)
    if (
        not is_of_shapes
        and trained != (num_tokens,)
        and (num_tokens is not None or (len(trained) == 1 and not hasattr(coder, "patch_sizes")))
    ):
        has = f"a row of {num_tokens} tokens" if num_tokens is not None else "a grid of tokens, rows and columns"
        raise UsageError(
            f"--tokenizer {tokenizer} makes {has}, this network was trained on {trained}; use the tokenizer it was trained on"
            + ("" if num_tokens is not None else ", or say image_grid=[rows, columns] in --config")
        )
    grid = list(trained) if size is None else [size // coder.stride] * len(trained)
    num_classes = backbone.config["num_classes"]
    given = _options(backbone, set(registry.FAMILIES["backbone"][1]))
    sampler = dict(sampling["sampler"])
    condition = sampling.get("condition")
    if not num_classes and condition is None:
        sampler["guidance"] = 1.0
    checked = configs.resolve(
        {
            "data": {"type": "shapes"}
            if is_of_shapes
            else {
                "type": "folder",
                "path": data,
                "size": getattr(coder, "image_size", grid[0] * coder.stride),
                "channels": 3,
            },
            "tokenizer": {"from": str(tokenizer)},
            "backbone": {"type": kind, **given},
            "condition": condition,
            "objective": sampling["objective"],
            "sampler": sampler,
            "train": {"num_samples": 1},
        },
        name="imported",
    )
    run_config = {**{key: value for key, value in checked.items() if key not in ("train", "log")}, "name": name}
    run_config = json.loads(json.dumps(run_config))
    pipeline = GeneratorPipeline(
        coder,
        backbone,
        objective=run_config["objective"],
        sampler=run_config["sampler"],
        grid=grid,
        class_names=[str(i) for i in range(num_classes)],
        condition=run_config["condition"],
        run_config=run_config,
    )
    return pipeline, given


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value


def _options(module: Any, measured: set[str]) -> dict[str, Any]:
    """What a part was made with, as plain data, without what is measured."""
    given = {name: value for name, value in module.config.items() if name[0] != "_" and name not in measured}
    return json.loads(json.dumps(given))


def render(found: Mapping[str, Any]) -> str:
    """What `import_weights` returned, for people."""
    kind = found.get("backbone") or found["tokenizer"]
    lines = [f"{found['out']}: {kind} with {found['parameters']:,} parameters, from {found['from']}"]
    for reason, keys in found["ignored"].items():
        few = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
        lines.append(f"{len(keys)} keys not needed: {reason} ({few})")
    if found["left_out"]:
        lines.append(f"in the file too, not read: {', '.join(found['left_out'])}")
    if found["check"]:
        lines += [f"{name.replace('_', ' ')}: {value}" for name, value in found["check"].items()]
    return "\n".join(lines)


def try_out(tokenizer: Any, channels: int, side: int) -> dict[str, Any]:
    """Encode and decode one drawn picture [1, channels, side, side]: waves of rising frequency with a bright disc.

    Returns: shapes of image, z, ids and reconstruction; ids_range and distinct_ids; psnr in dB; codes_agree, whether codes(ids) is z.

    Raises: GenkitError when what comes out is not finite.
    """
    import torch

    from genkit.metrics.reconstruction import psnr

    y, x = torch.meshgrid(torch.linspace(-1, 1, side), torch.linspace(-1, 1, side), indexing="ij")
    waves = torch.stack([torch.sin((4 + 3 * c) * (x + 0.5 * c * y).square() + 2 * y) for c in range(channels)])
    picture = torch.where((x.square() + y.square()) < 0.25, 0.8, 0.6 * waves)[None]
    with torch.inference_mode():
        encoded = tokenizer.encode(picture)
        rebuilt = tokenizer.decode(encoded.z).clamp(-1, 1)
        found: dict[str, Any] = {"image": list(picture.shape), "z": list(encoded.z.shape)}
        if encoded.ids is not None:
            found["ids"] = list(encoded.ids.shape)
            found["ids_range"] = [int(encoded.ids.min()), int(encoded.ids.max())]
            found["distinct_ids"] = len(encoded.ids.unique())
            found["codes_agree"] = torch.allclose(tokenizer.codes(encoded.ids), encoded.z, atol=1e-5)
    if not bool(rebuilt.isfinite().all()):
        raise GenkitError(
            "the imported tokenizer makes numbers that are not finite; the file is damaged or of another model"
        )
    return found | {"reconstruction": list(rebuilt.shape), "psnr": round(float(psnr(rebuilt, picture)), 2)}


def try_generator(pipeline: Any) -> dict[str, Any]:
    """Draw one image of the first class, in two steps where the sampler can. Returns: image, its shape; mean and std of its numbers; or of a shape its triangles.

    Raises: GenkitError when what comes out is not finite.
    """
    import torch

    steps = 2 if "num_steps" in pipeline.sampler else None
    with torch.inference_mode():
        image = pipeline.generate(torch.tensor([0 if pipeline.num_classes else -1]), [0], steps=steps)
    if isinstance(image, list):  # shapes; a function that is not finite has raised before
        return {"triangles": len(image[0].faces)}
    if not bool(image.isfinite().all()):
        raise GenkitError(
            "the imported generator makes numbers that are not finite; the file is damaged or of another model"
        )
    return {"image": list(image.shape), "mean": round(float(image.mean()), 4), "std": round(float(image.std()), 4)}


def _size(config: Mapping[str, Any]) -> int | None:
    """Pixels per side as the original's config says, wherever in it."""
    for name, value in config.items():
        found = _size(value) if isinstance(value, Mapping) else value
        if isinstance(found, int) and (
            isinstance(value, Mapping) or name in ("resolution", "sample_size", "image_size")
        ):
            return found
    return None


def _ignored(weights: Mapping[str, Any], patterns: Mapping[str, str]) -> dict[str, list[str]]:
    """Reason -> the keys that the importer leaves aside for it."""
    found: dict[str, list[str]] = {}
    for pattern, reason in patterns.items():
        if keys := sorted(key for key in weights if re.fullmatch(pattern, key)):
            found.setdefault(reason, []).extend(keys)
    return found


def _save(pipeline: Any, target: Path) -> None:
    """Under a temporary name, synced, renamed."""
    from genkit import files

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    except OSError as error:
        raise GenkitError(f"{target} cannot be written: {error}") from None
    try:
        pipeline.save_pretrained(temporary)
        temporary.chmod(0o755)
        files.sync_folder(temporary)
        temporary.rename(target)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise GenkitError(f"{target} cannot be written: {error}") from None
        raise
