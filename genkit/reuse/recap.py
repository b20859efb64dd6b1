"""Light steps between full ones: only the tokens of a group are computed, all others stay as the last full step saw them.

Liu et al., "Plug-and-Play Context Feature Reuse for Efficient Masked Generation" (ReCAP), NeurIPS 2025. What is kept and how a light step uses it:
genkit/nn/context.py, of octrees nn/octree_places.py; which tokens form a group: the samplers `masked`, `mar` and `octree_masked`. Nothing is approximated
between groups, as each begins with a full step.
"""

from __future__ import annotations

from typing import Literal

from genkit.errors import UsageError
from genkit.interfaces import Cache
from genkit.nn.context import Context


class Recap:
    """A group is one full step and `light` light ones. Works with backbones whose tokens meet by attention alone: masked, bert, uvit, mage, mar,
    octgpt, whose depths are counted each by itself.

    Args:
        full_steps: so many steps at the beginning are full ones by themselves: with few tokens known, what is kept ages fast. Of 32 steps the paper has
            up to 12, of MAR's half.
        light: light steps per full one; 1 in all that was published.
        keeps_condition: class tokens are not computed in light steps either.
        head_steps: of MAR: steps in which light steps draw a token; null = as full ones. The released code halves them, which makes up part of the speed it
            reports.
        choice: of masked ids, what light steps fill: "once", in the order that the full step was sure of them, as published; "anew", those of the group
            that they are surest of themselves, as full steps do. What is drawn first and unlikely is then not kept.
        spare: of "anew", as a part of what a group fills, how many more tokens it computes, so that its last steps have a choice, too.
    """

    def __init__(
        self,
        *,
        full_steps: int = 0,
        light: int = 1,
        keeps_condition: bool = False,
        head_steps: int | None = None,
        choice: Literal["once", "anew"] = "once",
        spare: float = 0.0,
    ):
        for name, value, least in (
            ("full_steps", full_steps, 0),
            ("light", light, 0),
            ("head_steps", head_steps, 1),
            ("spare", spare, 0),
        ):
            if value is not None and value < least:
                raise UsageError(f"sampler.reuse.{name}={value} must be at least {least}")
        if spare and choice == "once":
            raise UsageError(
                f"sampler.reuse.spare={spare} leaves a choice to light steps; set sampler.reuse.choice=anew, or spare=0"
            )
        self.full_steps, self.light, self.keeps_condition = full_steps, light, keeps_condition
        self.head_steps, self.choice, self.spare = head_steps, choice, spare

    def check_needs_no_choice(self, sampler: str) -> None:
        """Raises UsageError where light steps are to choose what they fill, for a sampler whose order is random."""
        if self.choice != "once":
            raise UsageError(
                f"sampler.reuse.choice={self.choice} is for sampler.type=masked, which fills what it is sure of; {sampler} has a random order: leave it out"
            )

    def groups(self, num_steps: int) -> list[int]:
        """Steps of each group; their sum is num_steps."""
        alone = min(self.full_steps, num_steps)
        whole, rest = divmod(num_steps - alone, 1 + self.light)
        return [1] * alone + [1 + self.light] * whole + [rest] * (rest > 0)

    def cache(self) -> Cache:
        """What the steps of a group share."""
        return {"context": Context(keeps_condition=self.keeps_condition)}
