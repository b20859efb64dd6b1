"""What a run directory says: how far it is, how good, and where the pictures lie. Reads text and JSON only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from genkit import config, console
from genkit.errors import UsageError, nearest

_RESOLVED = "config.resolved.yaml"


def runs(folder: Path) -> list[Path]:
    """Every run directly below a folder, by name."""
    return sorted(path.parent for path in folder.glob(f"*/{_RESOLVED}"))


def headline(run: Path) -> str:
    """One line: what is trained on what, and how far it is."""
    settings = config.parse((run / _RESOLVED).read_text(encoding="utf-8"))
    done = _samples(_history(run))
    total = settings["train"]["num_samples"]
    what = [
        f"{section} {settings[section]['type']}"
        for section in ("backbone", "tokenizer")
        if "type" in settings.get(section, {})
    ]
    frozen = settings["tokenizer"].get("from")
    on = f" on {frozen}" if frozen else ""
    return f"{what[0]}{on}, data {settings['data']['type']}, {done:,} of {total:,} samples ({done / total:.0%})"


def summary(path: str) -> dict[str, Any]:
    """What is known of a run. Raises UsageError for a path that is no run."""
    run = Path(path)
    if not (run / _RESOLVED).is_file():
        near = [other.name for other in runs(run.parent)]
        hint = nearest(run.name, near) if near else "train one with `genkit train RECIPE`"
        what = f"is not a run directory (it has no {_RESOLVED})" if run.exists() else "does not exist"
        raise UsageError(f"run {run} {what}; {hint}")
    history = _history(run)
    checkpoints = sorted(p.name for p in (run / "checkpoints").glob("[0-9]*") if p.is_dir())
    last = run / "checkpoints" / "last"
    pictures = sorted((run / "samples").glob("*.png"), key=lambda p: (p.stat().st_mtime, p.name))
    return {
        "run": run.as_posix(),
        "about": headline(run),
        "digest": config.digest(config.parse((run / _RESOLVED).read_text(encoding="utf-8"))),
        "metrics": history[-1] if history else {},
        "checkpoints": checkpoints,
        "last": last.resolve().name if last.exists() else None,
        "pictures": [p.as_posix() for p in pictures[-4:]],
        "evaluations": {p.as_posix(): _read_json(p) for p in sorted((run / "eval").glob("*.json"))},
    }


def render(found: dict[str, Any]) -> str:
    """The summary as people read it."""
    lines = [f"{found['run']}: {found['about']}", f"config digest {found['digest']}"]
    if found["metrics"]:
        lines += ["", "last measured", console.table(found["metrics"].items())]
    kept = ", ".join(found["checkpoints"])
    lines += ["", f"checkpoints: {kept} (last: {found['last']})" if kept else "no checkpoint yet"]
    for path, report in found["evaluations"].items():
        # A report also holds everything needed to repeat it; its rows are what people compare.
        lines += ["", path, console.records(report["rows"]) if "rows" in report else console.table(report.items())]
    if found["pictures"]:
        lines += ["", "latest pictures", *found["pictures"]]
    return "\n".join(lines)


def _history(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line cut short by a crash is left out."""
    file = run / "metrics.jsonl"
    if not file.is_file():
        return []
    records = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def _samples(history: list[dict[str, Any]]) -> int:
    return int(history[-1].get("samples", 0)) if history else 0


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        return {"unreadable": str(error)}
