"""Evaluation while a run trains: a report per checkpoint, and a link to the best one."""

from __future__ import annotations

import torch

from genkit.checkpoint import Run, point
from genkit.console import Progress
from genkit.errors import UsageError
from genkit.evaluation.report import Report
from genkit.job import Job
from genkit.snapshots import averaged, pipeline_of


def is_due(job: Job) -> bool:
    """Whether the checkpoint of this step is one to evaluate."""
    every, step = job.config["log"]["eval_every_steps"], job.counters.step
    return bool(every) and step > 0 and (step % every == 0 or job.counters.samples >= job.total_samples)


def judge(job: Job, progress: Progress) -> None:
    """Evaluate the checkpoint that was just saved with the recipe's metrics and averaged weights; nothing where its report exists.

    Training goes on as if nothing had happened: random state and modes are as before. Every process must call this.
    """
    from genkit.evaluation.evaluate import evaluate

    step = f"{job.counters.step:07d}"
    out = job.run.path / "eval" / f"{step}.json"
    if out.exists():
        return
    with torch.random.fork_rng(), averaged(job):
        pipeline = pipeline_of(job)
        pipeline.weights_variant = "ema" if job.ema is not None else "raw"
        pipeline.folder = job.run.path / "checkpoints" / step / "pipeline"
        report = evaluate(pipeline, out=out)
    job.accelerator.wait_for_everyone()
    if not job.accelerator.is_main_process:
        return
    best = link_best(job.run, job.config["log"]["best"])
    told = "  ".join(f"{row['metric']} {row['value']:.4g}" for row in report.rows)
    progress.line(f"step {job.counters.step}: {told}{'  (best so far)' if best == step else ''}")
    if job.board is not None:
        for row in report.rows:
            job.board.add_scalar(f"eval/{row['metric']}", row["value"], job.counters.samples)


def link_best(run: Run, metric: str | None) -> str | None:
    """Point checkpoints/best at the evaluated checkpoint with the best value, and return its name.

    Only reports comparable with the newest one count, of checkpoints that are still there; rotation keeps what a link points at.

    Args:
        metric: a name as reports have it, or the part in front of its brackets; None = the first that has a better direction.

    Raises: UsageError for a metric no report has.
    """
    checkpoints = run.path / "checkpoints"
    reports = {
        path.stem: Report.load(path)
        for path in sorted((run.path / "eval").glob("*.json"))
        if path.stem.isdigit() and (checkpoints / path.stem).is_dir()
    }
    if not reports:
        return None
    newest = reports[max(reports)]
    chosen = next((row for row in newest.rows if row["better"] and metric in (None, *_names(row))), None)
    if chosen is None:
        known = ", ".join(row["metric"] for row in newest.rows if row["better"])
        raise UsageError(
            f"log.best={metric} is not a metric that can be better or worse; this run has {known or 'none'}"
        )
    values = {
        step: row["value"]
        for step, report in reports.items()
        for row in report.rows
        if (row["metric"], row["comparable"]) == (chosen["metric"], chosen["comparable"])
    }
    best = (min if chosen["better"] == "lower" else max)(values, key=lambda step: values[step])
    point(checkpoints / "best", best)
    return best


def _names(row: dict[str, str]) -> tuple[str, str]:
    return row["metric"], row["metric"].partition(" (")[0]
