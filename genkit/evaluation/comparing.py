"""Reports side by side: one table per set of comparable numbers, curves over what differs, and an old report against a new one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from genkit import console
from genkit.errors import GenkitError, UsageError
from genkit.evaluation.report import Report
from genkit.optional import is_installed, require

# What a curve may run along: a key of a report's settings and how the axis is called.
_AXES = {"samples": "samples trained on", "num_steps": "sampler steps", "guidance": "guidance"}
# Settings that follow from the moment of an evaluation and not from what was evaluated.
_PASSING = ("batch_size", "processes", "device", "images_per_second", "seconds", "versions")


def compare(paths: Sequence[str | Path], out: str | Path | None = None) -> dict[str, Any]:
    """Reports as tables and, with `out`, as curves.

    Numbers stand in one table only if protocol, feature net, number of images, labels and reference are the same; what cannot be compared is
    never put side by side.

    Args:
        paths: reports, or run directories, which stand for every report in their eval/.
        out: folder for compare.md and, where something varies between the reports, curves.png.

    Returns: {"tables": [{"comparable", "rows"}], "budget", "unfair", "files"}; a row has "report" and a value per metric. "budget" says of every report
        of a generator what it was given: tokenizer (the beginning of its hash), parameters, samples, steps, guidance; "unfair" names what of it
        is not the same for all: their figures may stand side by side, but do not say which method is better.

    Raises: UsageError for a run without reports, GenkitError for a file that is no report.
    """
    reports = _collect(paths)
    names = _names(reports)
    tables: dict[str, dict[str, dict[str, Any]]] = {}
    for path, report in reports.items():
        for row in report.rows:
            line = tables.setdefault(row["comparable"], {}).setdefault(names[path], {"report": names[path]})
            line[row["metric"]] = row["value"]
    found: dict[str, Any] = {
        "tables": [{"comparable": key, "rows": list(rows.values())} for key, rows in tables.items()],
        **_budgets(reports, names),
        "files": [],
    }
    if out is not None:
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        shown = [*found["tables"], *_budget_table(found)]
        (folder / "compare.md").write_text(_markdown(shown), encoding="utf-8")
        found["files"] = [str(folder / "compare.md"), *_curves(reports, folder / "curves.png")]
    return found


def render(found: dict[str, Any]) -> str:
    """The tables as people read them."""
    tables = [*found["tables"], *_budget_table(found)]
    parts = [f"[{table['comparable']}]\n{console.records(table['rows'])}" for table in tables]
    return "\n\n".join([*parts, *found["files"]])


def _budgets(reports: dict[Path, Report], names: dict[Path, str]) -> dict[str, Any]:
    """What each generator was given, and what of it differs. Nothing for reports that do not say, or of a single run."""
    rows = []
    for path, report in reports.items():
        settings = report.settings
        if settings.get("parameters") is None:
            continue
        row = {name: settings.get(name) for name in ("parameters", "samples", "num_steps", "guidance")}
        rows.append({"report": names[path], "tokenizer": str(settings.get("tokenizer_sha256", ""))[:8], **row})
    if len(rows) < 2:
        return {"budget": [], "unfair": []}
    unfair = [name for name in ("tokenizer", "parameters", "samples") if not _are_same([row[name] for row in rows])]
    return {"budget": rows, "unfair": unfair}


def _are_same(values: list[Any]) -> bool:
    """Numbers within 5 % of each other are the same budget: sizes of networks cannot be chosen freely."""
    if all(isinstance(value, int) for value in values):
        return max(values) <= 1.05 * min(values)
    return len(set(values)) == 1


def _budget_table(found: dict[str, Any]) -> list[dict[str, Any]]:
    if not found["budget"]:
        return []
    verdict = f"NOT the same {', '.join(found['unfair'])}" if found["unfair"] else "the same for all, a fair comparison"
    return [{"comparable": f"what each was given: {verdict}", "rows": found["budget"]}]


def verify(
    path: str | Path, *, tolerance: float = 1e-4, device: str | None = None, batch_size: int = 64
) -> dict[str, Any]:
    """Evaluate again what a report is about, and say what differs.

    Args:
        tolerance: largest relative difference of a number that still counts as the same.

    Returns: {"same": whether all numbers are, "rows": [{"metric", "report", "now", "difference", "same"}], "differences": settings that
        changed, hashes and versions included}.

    Raises: GenkitError for a file that is no report, or one about an object in memory; what `evaluate` raises.
    """
    from genkit.evaluation.evaluate import evaluate

    old = Report.load(path)
    settings = old.settings
    new = evaluate(
        _target(Path(path), settings),
        metrics=settings["metrics"] if settings["protocol"] is None else None,
        reference=_first(settings, "reference") if settings["protocol"] is not None else None,
        protocol=settings["protocol"],
        weights=_first(settings, "weights"),
        count=settings["count"],
        labels=settings["labels"] if settings["labels"] in ("balanced", "random") else None,
        seed=settings["seed"],
        steps=settings["steps"],
        guidance=settings["guidance"],
        size=settings.get("size"),
        rope=settings.get("rope"),
        sampler=settings.get("sampler_changes", ()),
        ema=settings["ema"],
        device=device,
        batch_size=batch_size,
        out=Path(path).with_suffix(".verify.json"),
    )
    values = {row["metric"]: row["value"] for row in new.rows}
    rows = []
    for row in old.rows:
        now = values.get(row["metric"])
        difference = None if now is None else abs(now - row["value"])
        same = difference is not None and difference <= tolerance * max(abs(row["value"]), 1e-8)
        rows.append(
            {"metric": row["metric"], "report": row["value"], "now": now, "difference": difference, "same": same}
        )
    return {"same": all(row["same"] for row in rows), "rows": rows, "differences": _changes(old.settings, new.settings)}


def render_verification(found: dict[str, Any]) -> str:
    """What `verify` found, as people read it."""
    shown = [row | {"same": "yes" if row["same"] else "NO"} for row in found["rows"]]
    return "\n".join([console.records(shown), *(f"changed: {line}" for line in found["differences"])])


def _target(path: Path, settings: dict[str, Any]) -> Path:
    """What the report is about: the checkpoint of the run it lies in, else the path that was evaluated."""
    run = path.resolve().parent.parent
    if "step" in settings and (run / "config.resolved.yaml").is_file():
        return run / "checkpoints" / f"{settings['step']:07d}"
    target = Path(settings["target"])
    if not target.exists() and (path.parent / target.name).exists():
        target = path.parent / target.name  # reports of images lie beside them
    if not target.exists():
        raise GenkitError(f"{path} is about {target}, which is not here; run this where it is")
    if "step" in settings and (target / "config.resolved.yaml").is_file():
        return target / "checkpoints" / f"{settings['step']:07d}"
    return target


def _first(settings: dict[str, Any], option: str) -> str | None:
    """An option of the metrics that one argument sets for all of them."""
    return next((spec[option] for spec in settings["metrics"] if spec.get(option)), None)


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Settings that differ, one line each; versions of packages one by one."""
    lines = []
    flat = [
        ({k: v for k, v in side.items() if k not in (*_PASSING, "target")} | side["versions"]) for side in (old, new)
    ]
    for name in dict.fromkeys([*flat[0], *flat[1]]):
        if flat[0].get(name) != flat[1].get(name):
            lines.append(f"{name}: {flat[0].get(name)} then, {flat[1].get(name)} now")
    return lines


def _collect(paths: Sequence[str | Path]) -> dict[Path, Report]:
    found: list[Path] = []
    for given in map(Path, paths):
        if given.is_dir():
            own = sorted(p for p in (given / "eval").glob("*.json") if not p.name.endswith(".verify.json"))
            if not own:
                raise UsageError(f"{given} has no reports in eval/; make one with `genkit eval {given}`")
            found += own
        else:
            found.append(given)
    return {path: Report.load(path) for path in dict.fromkeys(found)}


def _names(reports: dict[Path, Report]) -> dict[Path, str]:
    """A name per report: its run and file, or the file alone."""
    return {
        path: f"{report.settings['run']}/{path.stem}" if report.settings.get("run") else path.stem
        for path, report in reports.items()
    }


def _markdown(tables: list[dict[str, Any]]) -> str:
    lines = []
    for table in tables:
        header = list(dict.fromkeys(key for row in table["rows"] for key in row))
        lines += [table["comparable"], "", f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
        lines += [f"| {' | '.join(console.number(row.get(key, '')) for key in header)} |" for row in table["rows"]]
        lines.append("")
    return "\n".join(lines)


def _curves(reports: dict[Path, Report], file: Path) -> list[str]:
    """A panel per metric and per setting that varies, a line per run. Nothing where nothing varies."""
    panels = []
    for axis in _AXES:
        series: dict[tuple[str, str], dict[tuple[Any, ...], list[tuple[float, float]]]] = {}
        for report in reports.values():
            place = report.settings.get(axis)
            if not isinstance(place, int | float):
                continue
            others = tuple(report.settings.get(name) for name in ("run", *_AXES) if name != axis)
            for row in report.rows:
                lines = series.setdefault((row["metric"], row["comparable"]), {})
                lines.setdefault(others, []).append((place, row["value"]))
        for (metric, _), lines in series.items():
            curved = {others: points for others, points in lines.items() if len({x for x, _ in points}) > 1}
            # A single point says something only of a run that has no curve here.
            runs = {others[0] for others in curved}
            shown = {others: points for others, points in lines.items() if others in curved or others[0] not in runs}
            if curved:
                panels.append((axis, metric, shown))
    if not panels:
        return []
    if not is_installed("matplotlib"):
        console.say("no curves: matplotlib is not installed; pip install 'genkit-torch[eval]'")
        return []
    require("matplotlib").use("agg")
    figure_module = require("matplotlib.figure")
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = figure_module.Figure(figsize=(4.5 * columns, 3.2 * rows), layout="constrained")
    for number, (axis, metric, lines) in enumerate(panels, 1):
        panel = figure.add_subplot(rows, columns, number)
        for others, points in lines.items():
            ordered = sorted(points)
            label = ", ".join(
                f"{_AXES[name]} {value:g}" if name in _AXES else str(value)
                for name, value in zip([n for n in ("run", *_AXES) if n != axis], others, strict=True)
                if value is not None
            )
            panel.plot([x for x, _ in ordered], [y for _, y in ordered], marker="o", label=label)
        panel.set_xlabel(_AXES[axis])
        panel.set_ylabel(metric)
        panel.legend(fontsize="x-small")
    figure.savefig(file, dpi=120)
    return [str(file)]
