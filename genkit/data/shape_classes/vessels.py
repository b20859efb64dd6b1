"""Mugs and bottles."""

from __future__ import annotations

import math

from genkit.data.shape_classes.design import Design, Dice, bent_rod, cylinder, rod, smooth
from genkit.meshes.solid_parts import Box, Lathe, Part, Vector


def mug(dice: Dice) -> Design:
    body = dice.pick("straight", "tapered", "round")
    r, h = dice.between(0.3, 0.4), dice.between(0.6, 0.9)
    wall = dice.between(0.04, 0.055)
    low = {"straight": 1.0, "tapered": dice.between(0.62, 0.8), "round": dice.between(0.6, 0.75)}[body]
    bulge = 1.12 if body == "round" else (1 + low) / 2
    outer = smooth([(r * low, 0.0), (r * bulge, h * 0.42), (r, h)], 8)
    inner = [(x - wall, max(y, wall * 1.4)) for x, y in outer if y > wall * 1.4]
    profile = [(0.0, 0.0), *outer, *reversed(inner), (inner[0][0], wall * 1.4), (0.0, wall * 1.4)]
    parts: list[Part] = [Lathe(profile)]
    handle = dice.pick("round", "square", "none")
    if handle != "none":
        thick = dice.between(0.04, 0.052)
        reach, half = dice.between(0.2, 0.28), h * dice.between(0.24, 0.32)
        middle = h * dice.between(0.48, 0.55)

        def wall_at(y: float) -> float:
            near = min(outer, key=lambda p: abs(p[1] - y))
            return near[0] - wall * 0.5

        if handle == "round":
            angles = [-math.pi / 2 + math.pi * i / 10 for i in range(11)]
            arc: list[Vector] = [(r * 0.98 + reach * math.cos(a), middle + half * math.sin(a), 0) for a in angles]
        else:
            arc = [(r + reach, middle - half, 0), (r + reach, middle + half, 0)]
        ends: list[Vector] = [(wall_at(middle + s * half), middle + s * half, 0) for s in (-1, 1)]
        parts += bent_rod([ends[0], *arc, ends[1]], thick)
    caption = f"a {body} mug with {'no' if handle == 'none' else f'a {handle}'} handle"
    return Design(parts, caption, {"body": body, "handle": handle})


def bottle(dice: Dice) -> Design:
    body = dice.pick("slim", "round", "square")
    r, h = dice.between(0.16, 0.22), dice.between(0.9, 1.1)
    neck, shoulder = dice.between(0.055, 0.085), dice.between(0.5, 0.68)
    if body == "round":
        r *= 1.35
    parts: list[Part] = []
    if body == "square":
        parts.append(Box((0, h * shoulder / 2, 0), (r, h * shoulder / 2, r), 0.04))
        line = smooth([(r * 0.95, 0.0), (r * 0.6, h * 0.08), (neck, h * 0.18)], 6)
        rise = h * (1 - shoulder)
        parts.append(Lathe([(0.0, -0.05), (r * 0.9, -0.05), *line, (neck, rise), (0.0, rise)], (0, h * shoulder, 0)))
    else:
        waist = dice.between(0.88, 1.05) if body == "slim" else dice.between(0.7, 0.85)
        line = smooth(
            [
                (r * waist, 0.0),
                (r, h * 0.25),
                (r * 0.98, h * shoulder * 0.85),
                (neck * 1.25, h * (shoulder + 0.15)),
                (neck, h),
            ],
            6,
        )
        parts.append(Lathe([(0.0, 0.0), *line, (0.0, h)]))
    cap = dice.pick("cap", "cork", "open")
    if cap == "cap":
        parts.append(cylinder((0, h - 0.05, 0), neck * 1.35, 0.12))
    elif cap == "cork":
        parts.append(rod((0, h - 0.03, 0), (0, h + 0.06, 0), neck * 0.7, neck * 0.85))
    else:
        parts.append(cylinder((0, h - 0.04, 0), neck * 1.25, 0.045))
    caption = f"a {body} bottle{ {'cap': ' with a cap', 'cork': ' with a cork', 'open': ''}[cap] }"
    return Design(parts, caption, {"body": body, "closure": cap})
