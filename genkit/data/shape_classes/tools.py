"""Hammers, keys, spoons and screwdrivers."""

from __future__ import annotations

import math

from genkit.data.shape_classes.design import Design, Dice, bent_rod, cylinder, rod
from genkit.meshes.solid_parts import Box, Lathe, Part, Polygon, Prism, Vector, turned


def tool(dice: Dice) -> Design:
    kind = dice.pick("hammer", "key", "spoon", "screwdriver")
    length = dice.between(0.75, 1.0)
    r = dice.between(0.04, 0.055)
    parts: list[Part] = []
    if kind == "hammer":
        head, thick = dice.between(0.2, 0.3), dice.between(0.07, 0.1)
        parts.append(rod((0, 0, 0), (0, length, 0), r * 1.2, r * 0.9))
        parts.append(Box((0.0, length, 0), (head * 0.6, thick, thick), 0.015))
        parts.append(
            Lathe(
                [(0.0, 0.0), (thick, 0.0), (thick * 1.15, 0.08), (thick * 1.15, 0.14), (0.0, 0.14)],
                (-head * 0.5, length, 0),
                turned(2, math.pi / 2),
            )
        )
        if dice.chance(0.6):
            claw: Polygon = [(0.0, thick), (0.0, -thick * 0.4), (head * 1.1, -thick * 1.4), (head * 1.1, -thick * 0.7)]
            parts.append(Prism(claw, thick * 0.6, (head * 0.5, length, 0)))
        else:
            parts.append(Box((head * 0.7, length, 0), (head * 0.4, thick * 0.8, thick * 0.8), 0.01))
    elif kind == "key":
        ring, thick = dice.between(0.17, 0.23), dice.between(0.045, 0.055)
        angles = [2 * math.pi * i / 16 for i in range(17)]
        squash = dice.between(0.7, 1.0)
        bow: list[Vector] = [(ring * math.cos(a), ring * squash * math.sin(a), 0) for a in angles]
        parts += bent_rod(bow, thick)
        end = -ring * squash - length * 0.8
        parts.append(rod((0, -ring * squash, 0), (0, end, 0), thick))
        for i in range(dice.count(1, 3)):
            y, reach = end + 0.06 + i * 0.13, dice.between(0.12, 0.22)
            parts.append(Box((reach / 2, y, 0), (reach / 2, 0.04, thick * 0.85)))
    elif kind == "spoon":
        bowl, thick = dice.between(0.14, 0.2), 0.036
        outer = [math.pi / 2 * i / 8 for i in range(9)]
        shell = [(bowl * math.cos(a) if i < 8 else 0.0, -bowl * 0.5 * math.sin(a)) for i, a in enumerate(outer)]
        inside = [
            ((bowl - thick) * math.cos(a) if i < 8 else 0.0, -(bowl * 0.5 - thick) * math.sin(a))
            for i, a in enumerate(outer)
        ]
        parts.append(Lathe([*shell, *reversed(inside)], (0, 0, 0)))
        lift = dice.between(0.0, 0.15)
        parts.append(rod((0, -0.02, bowl - thick * 0.6), (0, lift, length), 0.032, 0.045))
    else:
        grip = length * dice.between(0.35, 0.45)
        parts.append(rod((0, 0, 0), (0, grip, 0), r * 1.7, r * 1.3))
        parts.append(cylinder((0, grip * 0.9, 0), r * 0.85, length - grip * 0.7))
        flat = dice.between(0.05, 0.08)
        top = grip * 0.9 + length - grip * 0.7
        blade: Polygon = [(-r * 0.6, -0.06), (r * 0.6, -0.06), (flat, 0.06), (flat, 0.12), (-flat, 0.12), (-flat, 0.06)]
        parts.append(Prism(blade, 0.028, (0, top, 0)))
    return Design(parts, f"a {kind}", {"kind": kind})
