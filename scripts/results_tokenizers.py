"""Everything that docs/results/tokenizers.md reports: trains the tokenizers, evaluates them, draws the pictures, fills in the tables.

    python scripts/results_tokenizers.py                 # all of it: about a quarter of an hour on two idle CPU cores
    python scripts/results_tokenizers.py train --only 'fashion-*'
    python scripts/results_tokenizers.py measure draw page

It may be stopped at any time: what is finished is not done again. The tokenizers of a data set see the same images as often, in batches of the same size,
through networks of the same size (but for those whose networks are their own, see the page), with one thread each.
"""

from __future__ import annotations

import argparse
import fnmatch
import io
import json
import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pages import Store, fill, table
from PIL import Image
from torch import Tensor

import genkit
from genkit import coding, registry
from genkit.codec import lost
from genkit.evaluation.report import Report
from genkit.images import grid, to_pil, write_png
from genkit.metrics.reconstruction import psnr
from genkit.nn.grain import entropy_threshold
from genkit.objectives.reconstruction import perceptual_distance
from genkit.pipeline import open_run
from genkit.rng import Rng

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/results/tokenizers.md"
PICTURES = ROOT / "docs/results"
DATA = ("fashion", "emoji")
SIZE = "tokenizer.codebook_size=1024"
NO_RESTART = "tokenizer.restart=0"
LOG = ["log.sample_every_steps=100000", "log.save_every_steps=100000"]  # the end is all that counts

# Run -> (recipe, what is changed in it), on one latent grid with one budget: effects (a) and (c).
EQUAL = {
    "vq": ("vq", [SIZE]),
    "vq-no-restart": ("vq", [SIZE, NO_RESTART]),
    "rvq-2": ("rvq", [SIZE, "tokenizer.num_levels=2"]),
    "rvq-4": ("rvq", [SIZE, "tokenizer.num_levels=4"]),
    "rvq-8": ("rvq", [SIZE, "tokenizer.num_levels=8"]),
    "fsq": ("fsq", ["tokenizer.levels=[8,5,5,5]"]),
    "lfq": ("lfq", [SIZE]),
    "kl": ("kl", []),
    "rvq-4-no-restart": ("rvq", [SIZE, "tokenizer.num_levels=4", NO_RESTART]),
    "rvq-8-dropout": ("rvq", [SIZE, "tokenizer.num_levels=8", "tokenizer.min_levels=1"]),
    "bsq": ("bsq", [SIZE]),
    "ibq": ("ibq", [SIZE]),
}
BUDGET = {"fashion": 8_000, "emoji": 4_000}  # images, with repetition
# Effect (c): where the budget above is too short for codes to find their places, another one, NAME-long.
LONG_BUDGET = {"emoji": 16_000}
LONG = ("vq", "vq-no-restart", "rvq-4", "rvq-4-no-restart")
# Effect (b): cells of half the side, and regions that may have one code for four of them.
FINE = {"fashion": 2, "emoji": 4}
FINE_BUDGET = {"fashion": 5_000, "emoji": 8_000}
TARGETS = (0.25, 0.5, 0.75)  # shares of fine regions
GRAINS = (
    "fixed",
    "dqvae-25",
    "dqvae-50",
    "dqvae-75",
    "dqvae-entropy-25",
    "dqvae-entropy-50",
    "dqvae-entropy-75",
)
OTHERS = (
    "vqgan",
    "klgan",
    "maskgit-vqgan",
    "var_vq",
    "nfig",
    "titok",
)  # networks of their own
OTHERS_BUDGET = {
    "fashion": 3_200,
    "emoji": 2_000,
}  # far less than their recipes': adversarial ones are slow, and all have to be seen


def runs() -> dict[str, tuple[str, list[str]]]:
    """Name of each run -> (recipe, overrides), in the order of training."""
    found: dict[str, tuple[str, list[str]]] = {}

    def add_equal(data: str) -> None:
        budget = [f"train.num_samples={BUDGET[data]}", *LOG]
        found.update(
            {f"{data}-{name}": (f"toy/{recipe}-{data}", [*keys, *budget]) for name, (recipe, keys) in EQUAL.items()}
        )

    def add_long(data: str) -> None:
        budget = [f"train.num_samples={LONG_BUDGET[data]}", *LOG]
        found.update(
            {f"{data}-{name}-long": (f"toy/{EQUAL[name][0]}-{data}", [*EQUAL[name][1], *budget]) for name in LONG}
        )

    def add_fine(data: str) -> None:
        # Light networks of the same size, so that fixed and dynamic differ in nothing but the grains.
        keys = [f"train.num_samples={FINE_BUDGET[data]}", "train.lr=2e-3", f"tokenizer.stride={FINE[data]}", SIZE, *LOG]
        found[f"{data}-fixed"] = (f"toy/vq-{data}", keys)
        for target in TARGETS:
            found[name_of(data, "dqvae", target)] = (f"toy/dqvae-{data}", [*keys, f"tokenizer.targets=[{target}]"])
        for target in TARGETS:
            router = ["tokenizer.router=entropy", f"tokenizer.thresholds=[{threshold(data, target)}]"]
            found[name_of(data, "dqvae-entropy", target)] = (f"toy/dqvae-{data}", [*keys, *router])

    add_equal("fashion")
    add_fine("emoji")
    # What fills in lost ids, and predicts them for the coder.
    generator = ["tokenizer.from={out}/fashion-vq", f"train.num_samples={BUDGET['fashion']}", *LOG]
    found["fashion-masked"] = ("toy/masked-fashion", generator)
    add_equal("emoji")
    add_long("emoji")
    add_fine("fashion")
    for data in DATA:
        short = [f"train.num_samples={OTHERS_BUDGET[data]}", *LOG]
        found |= {f"{data}-{name}": (f"toy/{name}-{data}", short) for name in OTHERS}
    return found


def name_of(data: str, kind: str, target: float) -> str:
    return f"{data}-{kind}-{round(100 * target)}"


@cache
def threshold(data: str, share: float) -> float:
    """The entropy that this share of the regions of the training images exceeds, in nats; no less than what is flat to the eye."""
    return max(0.01, round(entropy_threshold(images_of(data, "train"), 2 * FINE[data], share), 4))


# Training


def train_one(name: str, recipe: str, keys: list[str], out: Path) -> None:
    """One run, trained and evaluated, with one thread; where it was finished before, nothing."""
    torch.set_num_threads(1)
    if (out / name / "finished").exists():
        return
    print("train", name, flush=True)
    genkit.train(recipe, [key.format(out=out) for key in keys], name=name, out=out, device="cpu")
    if not name.endswith("masked"):
        genkit.evaluate(str(out / name))
    (out / name / "finished").touch()


def train(out: Path, only: str, jobs: int) -> None:
    """All runs whose names match, so many side by side."""
    chosen = {name: run for name, run in runs().items() if fnmatch.fnmatch(name, only)}
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = [pool.submit(train_one, name, *run, out) for name, run in chosen.items()]
        for one in waiting:
            one.result()


# What `genkit eval` does not say


def finished(out: Path, name: str) -> bool:
    return (out / name / "finished").exists()


def validation(data: str) -> Tensor:
    """Every held-out image, [N, C, Y, X] in [-1, 1]."""
    return images_of(data, "val")


def images_of(data: str, split: str) -> Tensor:
    spec = {"type": data, "split": split} | ({"size": 64} if data == "emoji" else {"source": "embedded"})
    dataset = registry.build("data", spec)
    return torch.stack([dataset[i]["x"] for i in range(len(dataset))])


def evaluation(out: Path, name: str) -> Report:
    return Report.load(max(p for p in (out / name / "eval").glob("*.json") if p.stem.isdigit()))


def in_batches(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.inference_mode():
        return torch.cat([function(part) for part in x.split(128)])


def eight_bit(x: Tensor) -> Tensor:
    return torch.round((x.clamp(-1, 1) + 1) * 127.5) / 127.5 - 1


def distance(data: str, x: Tensor, y: Tensor) -> float:
    """Mean distance of pairs by the features of the net of this data set, what a perceptual loss would be."""
    _, look = perceptual_distance(f"{data}-cnn", tuple(x.shape[1:]))
    with torch.inference_mode():
        return float(torch.cat([look(a, b) for a, b in zip(x.split(128), y.split(128), strict=True)]).mean())


def mean_psnr(x: Tensor, y: Tensor) -> float:
    return float(psnr(x, eight_bit(y)).mean())


def levels(out: Path, name: str, data: str) -> list[dict[str, float]]:
    """Errors of one residual tokenizer with its first 1, 2, ... levels of ids, the others left out."""
    tokenizer = open_run(out / name).tokenizer
    x = validation(data)
    ids = in_batches(lambda part: tokenizer.encode(part).ids, x).permute(0, 2, 3, 1)  # [N, Y, X, Q]
    with torch.inference_mode():
        full = tokenizer.encoder(x).permute(0, 2, 3, 1)
    found = []
    for count in range(1, tokenizer.num_levels + 1):
        some = ids.clone()
        some[..., count:] = -1
        with torch.inference_mode():
            codes = tokenizer.quantizer.codes(some)
        rebuilt = in_batches(tokenizer.decode, tokenizer.scale(codes.permute(0, 3, 1, 2)))
        error = float((codes - full).square().mean() / full.square().mean())
        found.append({"levels": count, "latent_error": error, "psnr": mean_psnr(x, rebuilt)})
    return found


def codes_per_image(out: Path, name: str, data: str) -> float:
    tokenizer = open_run(out / name).tokenizer
    x = validation(data)
    if hasattr(tokenizer, "num_codes"):
        return float(in_batches(tokenizer.num_codes, x).double().mean())
    return float(np.prod([side // tokenizer.stride for side in x.shape[2:]]))


def rate_distortion(out: Path, data: str) -> dict[str, list[dict[str, float]]]:
    """Curve -> points {"bpp", "psnr", "distance"}, each of all held-out images, bytes of everything a decoder needs but the tokenizer."""
    x = eight_bit(validation(data))
    pictures = to_pil(x)
    curves: dict[str, list[dict[str, float]]] = {}

    def point(size: int, rebuilt: Tensor) -> dict[str, float]:
        bpp = 8 * size / (len(x) * x.shape[2] * x.shape[3])
        return {"bpp": bpp, "psnr": mean_psnr(x, rebuilt), "distance": distance(data, x, eight_bit(rebuilt))}

    def through_files(run: str, codes: int | None) -> dict[str, float]:
        with tempfile.TemporaryDirectory() as folder:
            images, coded, decoded = (Path(folder) / name for name in ("images", "codes.gtk", "decoded"))
            images.mkdir()
            for number, picture in enumerate(pictures):
                picture.save(images / f"{number:04}.png")
            found = coding.encode(str(out / run), str(images), str(coded), codes=codes, device="cpu")
            coding.decode(str(out / run), str(coded), str(decoded), device="cpu")
            return point(found["bytes"], torch.stack([read(path) for path in sorted(decoded.glob("*.png"))]))

    if finished(out, f"{data}-vq"):
        sizes = (8, 16, 32, 64, 128, 256, 512, None)
        curves["genkit vq, clustered"] = [through_files(f"{data}-vq", size) for size in sizes]
    deeper = [f"{data}-rvq-{depth}" for depth in (2, 4, 8) if finished(out, f"{data}-rvq-{depth}")]
    if deeper:
        curves["genkit rvq-2, -4, -8"] = [through_files(run, None) for run in deeper]
    # Their headers are longer than such small images: all images in one sheet is what shows the coder.
    sheet = mosaic(pictures)
    qualities = (1, 2, 4, 7, 10, 15, 20, 30, 40, 50, 65, 80)
    for kind, extra in (("JPEG", {"optimize": True}), ("WEBP", {"method": 6})):
        options = [{"format": kind, "quality": quality, **extra} for quality in qualities]
        curves[f"{kind}, a file each"] = [
            point(sum(len(data) for data, _ in files), torch.stack([from_pil(picture) for _, picture in files]))
            for option in options
            for files in [[through(picture, option) for picture in pictures]]
        ]
        curves[f"{kind}, one sheet"] = []
        for option in options:
            data_bytes, rebuilt = through(sheet, option)
            curves[f"{kind}, one sheet"].append(point(len(data_bytes), pieces(from_pil(rebuilt), x)))
    return curves


def through(picture: Image.Image, option: dict[str, Any]) -> tuple[bytes, Image.Image]:
    """A picture as a file of another format: (bytes, what is read from them), in the picture's own mode."""
    buffer = io.BytesIO()
    picture.save(buffer, **option)
    return buffer.getvalue(), Image.open(io.BytesIO(buffer.getvalue())).convert(picture.mode)


def mosaic(pictures: list[Image.Image]) -> Image.Image:
    """All of them on one white sheet, 12 a row, row by row, each at a multiple of 16 pixels so that no block lies on two of them."""
    side = -(-pictures[0].width // 16) * 16
    sheet = Image.new(
        pictures[0].mode, (12 * side, -(-len(pictures) // 12) * side), "black" if side > pictures[0].width else "white"
    )
    for number, picture in enumerate(pictures):
        sheet.paste(picture, (number % 12 * side, number // 12 * side))
    return sheet


def pieces(sheet: Tensor, like: Tensor) -> Tensor:
    """The inverse of `mosaic`, [C, Y, X] -> [N, C, y, x]."""
    height, width = like.shape[2:]
    side = -(-width // 16) * 16
    corners = [(number // 12 * side, number % 12 * side) for number in range(len(like))]
    return torch.stack([sheet[:, y : y + height, x : x + width] for y, x in corners])


def from_pil(picture: Image.Image) -> Tensor:
    """[C, Y, X] in [-1, 1]."""
    pixels = np.array(picture)
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return torch.from_numpy(pixels).float() / 127.5 - 1


def read(path: Path) -> Tensor:
    with Image.open(path) as picture:
        return from_pil(picture)


LOST = 0.2


def repaired(out: Path, x: Tensor) -> dict[str, Tensor]:
    """Row of the picture -> images: what becomes of 20 % lost ids, by every way of filling them in."""
    tokenizer, generator = open_run(out / "fashion-vq").tokenizer, open_run(out / "fashion-masked")
    ids = in_batches(lambda part: tokenizer.encode(part).ids, x)
    holes = torch.from_numpy(np.stack(lost.lose(list(ids.numpy()), LOST, 0, "none")))

    def decoded(some: Tensor) -> Tensor:
        return in_batches(lambda part: tokenizer.decode(tokenizer.codes(part)).clamp(-1, 1), some)

    nearest = torch.from_numpy(np.stack([lost.by_nearest(one) for one in holes.numpy()]))
    random = torch.where(
        holes < 0, Rng.at(0, 0, len(x)).integers(tokenizer.codebook_size, ids[0].numel()).view_as(ids), ids
    )
    shown = decoded(ids)
    gaps = torch.nn.functional.interpolate((holes < 0).float(), scale_factor=tokenizer.stride, mode="nearest")
    return {
        "image": x,
        "nothing lost": shown,
        "20 % lost": torch.where(gaps > 0, -torch.ones_like(shown), shown),
        "random ids": decoded(random),
        "nearest known": decoded(nearest),
        "by generator": decoded(lost.by_generator(generator, holes)),
    }


def measure(out: Path) -> None:
    """Everything that the runs allow which is not in out/measured.json yet."""
    store = Store(out / "measured.json")
    for data in DATA:
        for name in ("rvq-8", "rvq-8-dropout"):
            if finished(out, f"{data}-{name}"):
                store.get(f"{data}-{name} levels", partial(levels, out, f"{data}-{name}", data))
        for name in GRAINS:
            if finished(out, f"{data}-{name}"):
                store.get(f"{data}-{name} codes", partial(codes_per_image, out, f"{data}-{name}", data))
        if all(finished(out, f"{data}-{name}") for name in ("vq", "rvq-2", "rvq-4", "rvq-8")):
            store.get(f"{data} rate-distortion", partial(rate_distortion, out, data))
    if finished(out, "fashion-vq") and finished(out, "fashion-masked"):
        x = validation("fashion")
        store.get(
            "repair",
            lambda: {
                name: mean_psnr(x, y) for name, y in repaired(out, x).items() if name not in ("image", "20 % lost")
            },
        )


# Pictures


def draw(out: Path) -> None:
    """docs/results/*.png of what is there."""
    for data in DATA:
        x = validation(data)
        x = x[torch.linspace(0, len(x) - 1, 12).long()]
        rows, names = [x], ["image"]
        for name in (run.removeprefix(f"{data}-") for run in runs() if run.startswith(f"{data}-")):
            if name.endswith(("masked", "no-restart", "dropout", "long")) or not finished(out, f"{data}-{name}"):
                continue
            rows.append(open_run(out / f"{data}-{name}")(x))
            names.append(name)
        if len(rows) > 1:
            write_png(PICTURES / f"reconstructions-{data}.png", grid(torch.cat(rows), 12, names))
    if finished(out, "fashion-vq") and finished(out, "fashion-masked"):
        found = repaired(out, validation("fashion")[::84][:12])
        write_png(PICTURES / "repair-fashion.png", grid(torch.cat(list(found.values())), 12, list(found)))
    measured = Store(out / "measured.json").values
    shown = [data for data in DATA if f"{data} rate-distortion" in measured]
    if shown:
        plot(PICTURES / "rate-distortion.png", {data: measured[f"{data} rate-distortion"] for data in shown})


def plot(path: Path, found: dict[str, dict[str, list[dict[str, float]]]]) -> None:
    """A row for each data set: PSNR and feature distance against bits per pixel."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(found), 2, figsize=(11, 4.2 * len(found)), squeeze=False)
    for row, (data, curves) in zip(axes, found.items(), strict=True):
        for axis, figure_name, label in zip(
            row, ("psnr", "distance"), ("PSNR, dB", f"feature distance, {data}-cnn-v1"), strict=True
        ):
            for name, points in curves.items():
                ours = name.startswith("genkit")
                style = {
                    "marker": "o" if ours else ".",
                    "linewidth": 2 if ours else 1,
                    "linestyle": ":" if "each" in name else "-",
                }
                axis.plot([p["bpp"] for p in points], [p[figure_name] for p in points], label=name, **style)
            axis.set(xscale="log", xlabel="bits per pixel", ylabel=label, title=data)
            axis.set_xticks([0.05, 0.1, 0.2, 0.5, 1, 2, 4], ["0.05", "0.1", "0.2", "0.5", "1", "2", "4"])
            axis.set_xticks([], minor=True)
            axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


# The page


def page(out: Path) -> None:
    """Write every table between its two marks in docs/results/tokenizers.md."""
    fill(PAGE, tables(out, Store(out / "measured.json").values))


def tables(out: Path, measured: dict[str, Any]) -> dict[str, str]:
    found = {}
    for data in DATA:
        names = [name for name in (*EQUAL, *OTHERS) if finished(out, f"{data}-{name}")]
        found[f"a {data}"] = table(
            ("tokenizer", "ids per image", "bits per image", "PSNR, dB", "SSIM", "rFD", "usage", "perplexity"),
            [_line(out, data, name) for name in names],
        )
        for kind in ("rvq-8", "rvq-8-dropout"):
            points = measured.get(f"{data}-{kind} levels", [])
            found[f"levels {data} {kind}"] = table(
                ("levels", *(str(p["levels"]) for p in points)),
                [
                    ("error of the latents", *(f"{p['latent_error']:.3f}" for p in points)),
                    ("PSNR, dB", *(f"{p['psnr']:.2f}" for p in points)),
                ],
            )
        found[f"b {data}"] = _grains(out, data, measured)
        found[f"c {data}"] = table(
            ("tokenizer", "with restarts, training", "held out", "without, training", "held out"),
            [
                (
                    f"{name}{budget}",
                    *_usage(out, f"{data}-{name}{budget}"),
                    *_usage(out, f"{data}-{name}-no-restart{budget}"),
                )
                for budget in ("", "-long")
                for name in ("vq", "rvq-4")
                if finished(out, f"{data}-{name}{budget}") and finished(out, f"{data}-{name}-no-restart{budget}")
            ],
        )
        found[f"d {data}"] = _rates(measured.get(f"{data} rate-distortion", {}))
    repair = measured.get("repair", {})
    found["repair"] = table(("ids", "PSNR, dB"), [(name, f"{value:.2f}") for name, value in repair.items()])
    return found


def _line(out: Path, data: str, name: str) -> tuple[str, ...]:
    report = evaluation(out, f"{data}-{name}")
    tokenizer = open_run(out / f"{data}-{name}").tokenizer
    ids, use = "-", ("-", "-")
    bits = "-"
    if tokenizer.num_levels:
        count = tokenizer.encode(validation(data)[:1]).ids.numel()
        ids, bits = str(count), f"{count * np.log2(tokenizer.codebook_size):.0f}"
        use = (f"{100 * report['codebook usage']:.1f} %", f"{report['codebook perplexity']:.0f}")
    rfd = next(row["value"] for row in report.rows if row["metric"].startswith("rFD"))
    return (name, ids, bits, f"{report['PSNR']:.2f}", f"{report['SSIM']:.3f}", f"{rfd:.3g}", *use)


def _usage(out: Path, name: str) -> tuple[str, str]:
    """Share of codes used over the last 100 steps or so of training, and on the held-out images."""
    last = json.loads((out / name / "metrics.jsonl").read_text().splitlines()[-1])
    return f"{100 * last['usage']:.1f} %", f"{100 * evaluation(out, name)['codebook usage']:.1f} %"


def _grains(out: Path, data: str, measured: dict[str, Any]) -> str:
    rows = []
    fixed = measured.get(f"{data}-fixed codes")
    for name in GRAINS:
        codes = measured.get(f"{data}-{name} codes")
        if codes is None or fixed is None:
            continue
        report = evaluation(out, f"{data}-{name}")
        rfd = next(row["value"] for row in report.rows if row["metric"].startswith("rFD"))
        rows.append(
            (
                name,
                f"{codes:.1f}",
                f"{100 * codes / fixed:.0f} %",
                f"{report['PSNR']:.2f}",
                f"{report['SSIM']:.3f}",
                f"{rfd:.3g}",
            )
        )
    return table(("tokenizer", "codes per image", "of the fixed", "PSNR, dB", "SSIM", "rFD"), rows)


def _rates(curves: dict[str, list[dict[str, float]]]) -> str:
    """Our points, and each peer at the same bits per pixel, read off between its own points."""
    peers = ("JPEG, one sheet", "WEBP, one sheet")
    rows = []
    for name, points in curves.items():
        if not name.startswith("genkit"):
            continue
        for p in points:
            cells = [f"{p['bpp']:.3f}", f"{p['psnr']:.2f}"]
            cells += [_at(curves[peer], p["bpp"], "psnr", "{:.2f}") for peer in peers]
            cells += [f"{p['distance']:.3f}", *(_at(curves[peer], p["bpp"], "distance", "{:.3f}") for peer in peers)]
            rows.append((name, *cells))
    return table(
        ("codec", "bits per pixel", "PSNR, dB", "JPEG's", "WebP's", "feature distance", "JPEG's", "WebP's"), rows
    )


def _at(points: list[dict[str, float]], bpp: float, name: str, form: str) -> str:
    """A figure at some rate, linear in the logarithm of the rate; "-" outside the curve."""
    points = sorted(points, key=lambda p: p["bpp"])
    rates = [np.log(p["bpp"]) for p in points]
    if not rates[0] <= np.log(bpp) <= rates[-1]:
        return "-"
    return form.format(float(np.interp(np.log(bpp), rates, [p[name] for p in points])))


STEPS = ("train", "measure", "draw", "page")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"{', '.join(STEPS)} (default: all)")
    parser.add_argument("--out", type=Path, default=Path("runs/results-tokenizers"), help="where the runs lie")
    parser.add_argument("--only", default="*", help="train only runs of such names")
    parser.add_argument("--jobs", "-j", type=int, default=2, help="trainings side by side")
    args = parser.parse_args()
    if unknown := set(args.steps) - set(STEPS):
        parser.error(f"no such step: {', '.join(sorted(unknown))}; there are {', '.join(STEPS)}")
    out = args.out.resolve()
    steps = args.steps or STEPS
    if "train" in steps:
        train(out, args.only, args.jobs)
    torch.set_num_threads(args.jobs)
    for name, step in (("measure", measure), ("draw", draw), ("page", page)):
        if name in steps:
            step(out)


if __name__ == "__main__":
    main()
