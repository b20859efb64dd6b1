"""All kernels with a compiled path, one suite after another: selective_scan, linear_attention, linrec, block_sparse_attention, octree_attention."""

from __future__ import annotations

from collections.abc import Iterable

from genkit.bench import Case, load

SUITES = ("selective_scan", "linear_attention", "linrec", "block_sparse_attention", "octree_attention")


def cases(quick: bool) -> Iterable[Case]:
    for suite in SUITES:
        yield from load(suite)(quick)
