"""Airplanes, cars and rockets."""

from __future__ import annotations

import math

from genkit.data.shape_classes.design import Design, Dice, product, rod
from genkit.meshes.solid_parts import Box, Lathe, Part, Polygon, Prism, turned


def airplane(dice: Dice) -> Design:
    wings = dice.pick("swept", "straight", "delta")
    engines = dice.pick("none", "two", "four") if wings != "delta" else dice.pick("none", "two")
    tail = dice.pick("low", "high")
    length, r = dice.between(0.75, 0.95), dice.between(0.07, 0.105)
    parts: list[Part] = [
        rod((0, 0, -length * 0.35), (0, 0, length * 0.55), r),
        rod((0, 0, length * 0.5), (0, -r * 0.2, length), r, r * dice.between(0.45, 0.7)),
        rod((0, 0, -length * 0.3), (0, r * 0.5, -length), r, r * 0.42),
    ]
    span, chord = dice.between(0.65, 0.95), dice.between(0.2, 0.28)
    thick = 0.03
    sweep = {"swept": dice.between(0.28, 0.45), "straight": dice.between(0.0, 0.06), "delta": 0.0}[wings]
    tip = chord * dice.between(0.4, 0.7)
    front = dice.between(0.1, 0.2)
    dihedral = dice.between(0.0, 0.12)
    height = dice.pick("low", "middle")
    y = -r * 0.55 if height == "low" else 0.0
    for side in (-1, 1):
        # The outline lies in the plane of the wing: x outwards, y forwards.
        if wings == "delta":
            outline: Polygon = [(0, front + 0.25), (span * 0.75, -0.4), (span * 0.75, -0.5), (0, -0.5)]
        else:
            outline = [(0, front), (span, front - sweep), (span, front - sweep - tip), (0, front - chord * 1.35)]
        outline = [(side * x, z) for x, z in outline]
        lift = math.atan(dihedral) * side
        turn = product(turned(2, lift), turned(0, math.pi / 2))
        parts.append(Prism(outline, thick, (0, y, 0), turn))
    back = -length + 0.02
    up = r * 0.5 + (0.24 if tail == "high" else 0.0)
    for side in (-1, 1):
        small: Polygon = [(0, 0.16), (side * 0.32, 0.03), (side * 0.32, -0.07), (0, -0.05)]
        parts.append(Prism(small, 0.026, (0, up, back), turned(0, math.pi / 2)))
    fin: Polygon = [(0.0, 0.0), (-0.1, 0.3), (-0.22, 0.3), (-0.2, 0.0)]
    parts.append(Prism(fin, 0.028, (0, 0.02, back + 0.18), turned(1, -math.pi / 2)))
    for place in {"none": [], "two": [0.34], "four": [0.28, 0.56]}[engines]:
        for side in (-1, 1):
            x = side * span * place
            z = front - sweep * place - 0.02
            parts.append(
                rod(
                    (x, y - 0.075 + dihedral * abs(x), z + 0.09),
                    (x, y - 0.075 + dihedral * abs(x), z - 0.12),
                    0.062,
                    0.045,
                )
            )
    caption = f"an airplane with {wings} wings, a {tail} tail and {'no' if engines == 'none' else engines} engines"
    return Design(parts, caption, {"wings": wings, "engines": engines, "tail": tail})


def car(dice: Dice) -> Design:
    kind = dice.pick("sedan", "bus", "truck", "hatchback")
    length, w = dice.between(0.8, 0.95), dice.between(0.33, 0.4)
    wheel, clear = dice.between(0.13, 0.17), dice.between(0.08, 0.12)
    body = dice.between(0.24, 0.3)
    level = clear + body
    r = dice.between(0.02, 0.05)
    cabin = dice.between(0.2, 0.27)
    side_on = turned(1, -math.pi / 2)  # the outline's x becomes the length of the car
    parts: list[Part] = []
    if kind == "bus":
        tall = dice.between(0.3, 0.4)
        parts.append(Box((0, clear + (body + tall) / 2, 0), (w, (body + tall) / 2, length), r))
    else:
        parts.append(Box((0, clear + body / 2, 0), (w, body / 2, length), r))
        if kind == "truck":
            start = length * dice.between(0.35, 0.5)
            parts.append(
                Box(
                    (0, level + cabin / 2 - 0.02, (length + start) / 2 - 0.04),
                    (w * 0.96, cabin / 2 + 0.02, (length - start) / 2),
                    r,
                )
            )
            load = dice.between(0.32, 0.48)
            parts.append(
                Box(
                    (0, level + load / 2 - 0.02, (-length + start) / 2 - 0.03),
                    (w, load / 2, (length + start) / 2 - 0.06),
                    0.01,
                )
            )
        else:
            hood, trunk = (
                length * dice.between(0.3, 0.45),
                length * (dice.between(0.5, 0.65) if kind == "sedan" else 0.92),
            )
            slope, rear = dice.between(0.15, 0.28), dice.between(0.05, 0.2)
            outline: Polygon = [
                (-trunk, level - 0.03),
                (hood, level - 0.03),
                (hood - slope, level + cabin),
                (-trunk + rear, level + cabin),
            ]
            parts.append(Prism(outline, w * 0.88, (0, 0, 0), side_on))
    axles = [length * 0.62, -length * 0.62]
    for z in axles:
        for side in (-1, 1):
            tyre: Polygon = [(0.0, -0.06), (wheel, -0.06), (wheel, 0.06), (0.0, 0.06)]
            parts.append(Lathe(tyre, (side * (w - 0.02), wheel, z), turned(2, math.pi / 2)))
        parts.append(rod((-w, wheel, z), (w, wheel, z), 0.035))
    return Design(parts, f"a {kind}", {"kind": kind})


def rocket(dice: Dice) -> Design:
    stages = dice.count(1, 3)
    fins = dice.count(3, 5)
    r, h = dice.between(0.13, 0.2), dice.between(0.9, 1.2)
    line: list[tuple[float, float]] = [(0.0, 0.0)]
    flare = dice.between(0.6, 0.95)
    line += [(r * flare, 0.0), (r * 0.75, 0.1), (r, 0.12)]
    y, radius = 0.12, r
    for stage in range(stages):
        y += h / stages * (0.7 if stage else 0.8)
        line.append((radius, y))
        if stage < stages - 1:
            radius *= dice.between(0.68, 0.85)
            line.append((radius, y + 0.05))
            y += 0.05
    nose = dice.pick("pointed", "round")
    tall = dice.between(0.3, 0.45) if nose == "pointed" else radius
    steps = 8
    for i in range(1, steps + 1):
        a = math.pi / 2 * i / steps
        width = radius * (math.cos(a) if nose == "round" else (1 - i / steps) ** 0.7)
        line.append((width if i < steps else 0.0, y + tall * (math.sin(a) if nose == "round" else i / steps)))
    parts: list[Part] = [Lathe(line)]
    out, tip = dice.between(0.16, 0.28), dice.between(0.08, 0.16)
    root = dice.between(0.28, 0.42)
    for i in range(fins):
        outline: Polygon = [(r * 0.3, 0.1), (r + out, -0.04), (r + out, tip - 0.04), (r * 0.3, root)]
        parts.append(Prism(outline, 0.028, (0, 0.03, 0), turned(1, 2 * math.pi * i / fins)))
    boosters = dice.chance(0.3)
    if boosters:
        for side in (-1, 1):
            parts.append(rod((0, 0.1, side * (r + 0.07)), (0, h * 0.5, side * (r + 0.07)), 0.085, 0.07))
    caption = f"a rocket of {stages} stages with {fins} fins and a {nose} nose{', with boosters' if boosters else ''}"
    if stages == 1:
        caption = caption.replace("1 stages", "one stage")
    return Design(
        parts,
        caption,
        {"stages": str(stages), "fins": str(fins), "nose": nose, "boosters": "yes" if boosters else "no"},
    )
