"""Numbers with how they were measured: the one form in which genkit prints, saves and compares them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from genkit import files
from genkit.errors import GenkitError


@dataclass
class Report:
    """What an evaluation found.

    Attributes:
        rows: {"metric", "value", "better", "comparable", "protocol"} each. "comparable" names everything that has to be equal for two values to
            be comparable: protocol, feature net, number of images, how labels were chosen, reference. "protocol" adds what was
            evaluated and how it was sampled. "better" is "lower", "higher" or "" where it is neither.
        details: numbers below the rows, by name: "class accuracy: trouser".
        notes: what a reader must know beside the numbers.
        settings: everything needed to repeat the evaluation, versions and hashes included.
        path: where it was saved, if it was.
    """

    rows: list[dict[str, Any]]
    details: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None

    def __getitem__(self, metric: str) -> float:
        """A value by the metric's full name, or by the name in front of its brackets: report["FD"] for "FD (fashion-cnn-v1)"."""
        values = self.details | {row["metric"].partition(" (")[0]: row["value"] for row in self.rows}
        return (values | {row["metric"]: row["value"] for row in self.rows})[metric]

    def keys(self) -> list[str]:
        return [row["metric"] for row in self.rows]

    def to_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "details": self.details, "notes": self.notes, "settings": self.settings}

    def save(self, path: str | Path) -> None:
        """Write everything as JSON."""
        self.path = Path(path)
        files.write_json(self.path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """A saved report. Raises GenkitError for a file that is none."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            report = cls(content["rows"], content["details"], content["notes"], content["settings"], Path(path))
            for row in report.rows:
                row["value"], row["metric"], row["comparable"], row["protocol"]
        except FileNotFoundError:
            raise GenkitError(
                f"no such report: {path}; `genkit eval` writes one of a run as RUN/eval/STEP.json"
            ) from None
        except IsADirectoryError:
            raise GenkitError(f"{path} is a folder; name a report in it, such as RUN/eval/STEP.json") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise GenkitError(f"{path} is not a report of `genkit eval` ({error!r})") from None
        return report

    def __str__(self) -> str:
        """One line per number with its protocol, then the notes."""
        names = [row["metric"] for row in self.rows]
        values = [f"{row['value']:.4g}" for row in self.rows]
        width, digits = max(map(len, names)), max(map(len, values))
        lines = [
            f"{name:{width}}  {value:>{digits}}  [{row['protocol']}]"
            for name, value, row in zip(names, values, self.rows, strict=True)
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])
