"""Chairs, tables, lamps, sofas, beds and shelves."""

from __future__ import annotations

import math

from genkit.data.shape_classes.design import Design, Dice, bent_rod, corners, cylinder, hollow_dome, rod, spread
from genkit.meshes.solid_parts import Box, Lathe, Part, Polygon, Prism, Vector, turned

OVERLAP = 0.012


def standing(dice: Dice, kind: str, x: float, z: float, height: float) -> list[Part]:
    """What holds up a plate whose lower side is at `height`: legs of a kind, at most x and z from the middle."""
    top = height + OVERLAP
    thick = dice.between(0.026, 0.042)
    if kind == "post":
        arms = dice.count(3, 5)
        foot = min(x, z) * 1.05
        hub = height * dice.between(0.14, 0.22)
        angles = [2 * math.pi * (i + 0.25) / arms for i in range(arms)]
        feet = [rod((0, hub, 0), (foot * math.sin(a), thick, foot * math.cos(a)), thick * 1.1, thick) for a in angles]
        return [cylinder((0, hub * 0.5, 0), thick * 1.3, top - hub * 0.5), *feet]
    if kind == "pedestal":
        base = min(x, z) * dice.between(0.75, 1.05)
        plate = dice.between(0.03, 0.05)
        flare = dice.between(0.4, 0.6)
        profile = [
            (0.0, 0.0),
            (base, 0.0),
            (base, plate),
            (thick * 1.6, height * flare),
            (thick * 1.6, top),
            (0.0, top),
        ]
        return [Lathe(profile)]
    if kind == "sled":
        rails: list[Part] = []
        for side in (-x, x):
            path: list[Vector] = [(side, top, -z), (side, thick, -z), (side, thick, z), (side, top, z)]
            rails += bent_rod(path, thick)
        return rails
    if kind == "panels":
        return [Box((side, top / 2, 0), (thick, top / 2, z)) for side in (-x, x)]
    splay = dice.between(0.12, 0.2) if kind == "splayed" else 0.0
    taper = dice.between(0.65, 1.0)
    legs: list[Part] = []
    for sx, sz in corners(x, z):
        if kind == "square":
            legs.append(Box((sx, top / 2, sz), (thick, top / 2, thick)))
        else:
            end: Vector = (sx * (1 + splay), thick * taper, sz * (1 + splay))
            legs.append(rod((sx, top - thick, sz), end, thick * 1.1, thick * taper * 1.1))
    return legs


def chair(dice: Dice) -> Design:
    seat = dice.pick("square", "square", "round")
    legs = dice.pick("straight", "square", "splayed", "post", "sled")
    back = dice.pick("panel", "slatted", "ladder", "framed", "none")
    w, d, t = dice.between(0.21, 0.29), dice.between(0.2, 0.27), dice.between(0.022, 0.04)
    h = dice.between(0.38, 0.5)
    parts: list[Part] = []
    if seat == "square":
        parts.append(Box((0, h, 0), (w, t, d), min(t, dice.between(0.005, 0.04)) * 0.9))
        reach = (w - 0.045, d - 0.045)
    else:
        w = d = (w + d) / 2
        parts.append(cylinder((0, h - t, 0), w, 2 * t, w * dice.between(0.92, 1.0)))
        reach = (w * 0.62, w * 0.62)
    parts += standing(dice, legs, *reach, h - t)
    if back != "none":
        rise, lean = dice.between(0.3, 0.56), dice.between(0.0, 0.22)
        thick = dice.between(0.024, 0.036)
        wide = w if seat == "square" else w * 0.75
        z0 = -(d if seat == "square" else w * 0.72) + thick

        def at(x: float, y: float) -> Vector:
            return (x, h + y, z0 - y * lean)

        tilt = turned(0, -math.atan(lean))
        posts = [rod(at(side * (wide - thick), 0), at(side * (wide - thick), rise), thick) for side in (-1, 1)]
        if back == "panel":
            low = dice.between(0.0, 0.45) * rise
            middle = at(0, (low + rise) / 2)
            parts.append(Box(middle, (wide, (rise - low) / 2 * math.hypot(1, lean), thick), thick * 0.7, tilt))
            parts += posts if low > 0.02 else []
            if low <= 0.02:
                parts.append(Box(at(0, rise * 0.1), (wide, rise * 0.15, thick), thick * 0.7, tilt))
        elif back == "slatted":
            parts += [*posts, rod(at(-wide + thick, rise), at(wide - thick, rise), thick)]
            bars = dice.count(2, 4)
            places = [(-1 + 2 * (i + 1) / (bars + 1)) * (wide - thick) for i in range(bars)]
            parts += [rod(at(x, 0), at(x, rise), thick * 0.85) for x in places]
        elif back == "ladder":
            rungs = dice.count(2, 3)
            parts += posts
            for y in spread(rise * 0.38, rise - 0.02, rungs):
                parts.append(Box(at(0, y), (wide - thick, 0.028, thick * 0.85), thick * 0.5, tilt))
        else:
            steps = 12
            angles = [math.pi * (i / steps) for i in range(steps + 1)]
            arch = [at((wide - thick) * math.cos(a), rise * (0.55 + 0.45 * math.sin(a))) for a in angles]
            parts += [*bent_rod([at(wide - thick, 0), *arch, at(-wide + thick, 0)], thick)]
    arms = back != "none" and seat == "square" and dice.chance(0.35)
    if arms:
        y, thick = h + dice.between(0.16, 0.22), dice.between(0.022, 0.03)
        for side in (-1, 1):
            x = side * (w - thick)
            parts += [
                rod((x, h, d * 0.7), (x, y, d * 0.7), thick),
                rod((x, y, d * 0.75), (x, y, z0 - (y - h) * lean), thick),
            ]
    words = {"none": "no back", "panel": "a panel back", "framed": "a round open back"}.get(back, f"a {back} back")
    called = {"post": "a central post", "sled": "a sled base"}.get(legs, f"{legs} legs")
    caption = f"a chair with a {seat} seat, {called}, {words}{' and arms' if arms else ''}"
    return Design(parts, caption, {"seat": seat, "legs": legs, "back": back, "arms": "yes" if arms else "no"})


def table(dice: Dice) -> Design:
    top = dice.pick("rectangular", "round", "oval", "square")
    legs = dice.pick("straight", "square", "splayed", "pedestal", "panels", "sled")
    w, d = dice.between(0.5, 0.8), dice.between(0.3, 0.45)
    if top in ("round", "square"):
        w = d = dice.between(0.4, 0.55)
    h, t = dice.between(0.35, 0.75), dice.between(0.028, 0.045)
    parts: list[Part] = []
    if top in ("rectangular", "square"):
        parts.append(Box((0, h, 0), (w, t, d), t * dice.between(0.05, 0.9)))
        reach = (w - 0.07, d - 0.06)
    elif top == "round":
        parts.append(cylinder((0, h - t, 0), w * dice.between(0.9, 1.0), 2 * t, w))
        reach = (w * 0.6, w * 0.6)
    else:
        angles = [2 * math.pi * i / 28 for i in range(28)]
        outline = [(w * math.cos(a), d * math.sin(a)) for a in angles]
        parts.append(Prism(outline, t, (0, h, 0), turned(0, -math.pi / 2)))
        reach = (w * 0.6, d * 0.6)
    parts += standing(dice, legs, *reach, h - t)
    apron = legs in ("straight", "square") and dice.chance(0.4)
    if apron:
        tall = dice.between(0.04, 0.07)
        y = h - t - tall + OVERLAP
        parts += [Box((0, y, side * reach[1]), (reach[0], tall, 0.025)) for side in (-1, 1)]
        parts += [Box((side * reach[0], y, 0), (0.025, tall, reach[1])) for side in (-1, 1)]
    shelf = legs in ("straight", "square", "panels") and dice.chance(0.3)
    if shelf:
        parts.append(Box((0, h * dice.between(0.2, 0.4), 0), (reach[0], 0.026, reach[1])))
    called = {"pedestal": "a pedestal", "panels": "two side panels", "sled": "a sled base"}.get(legs, f"{legs} legs")
    caption = f"{'an' if top == 'oval' else 'a'} {top} table with {called}{' and a shelf' if shelf else ''}"
    return Design(parts, caption, {"top": top, "legs": legs, "shelf": "yes" if shelf else "no"})


def lamp(dice: Dice) -> Design:
    kind = dice.pick("table", "floor", "desk")
    shade = dice.pick("conical", "drum", "dome")
    wide = dice.between(0.16, 0.24)
    tall = dice.between(0.16, 0.26)
    thick = 0.036 if kind == "floor" else 0.024
    stem = dice.between(0.02, 0.028) * (1.5 if kind == "floor" else 1.0)
    height = dice.between(0.9, 1.3) if kind == "floor" else dice.between(0.32, 0.55)
    base = dice.pick("disc", "box", "dome")
    foot = dice.between(0.13, 0.19) * (1.2 if kind == "floor" else 1.0)
    parts: list[Part] = []
    if base == "disc":
        parts.append(cylinder((0, 0, 0), foot, 0.05, foot * dice.between(0.7, 1.0)))
    elif base == "box":
        parts.append(Box((0, 0.03, 0), (foot * 0.85, 0.03, foot * 0.85), 0.008))
    else:
        steps = [math.pi / 2 * i / 8 for i in range(9)]
        dome = [(foot * math.cos(a) if i < 8 else 0.0, foot * 0.55 * math.sin(a)) for i, a in enumerate(steps)]
        parts.append(Lathe([(0.0, 0.0), *dome]))
    if kind == "table" and dice.chance(0.5):
        belly = dice.between(0.06, 0.11)
        parts.append(rod((0, height * 0.35, 0), (0, height * 0.6, 0), belly, belly * dice.between(0.5, 0.9)))
    x = 0.0
    if kind == "desk":
        bend = dice.between(0.12, 0.22)
        x = dice.between(0.1, 0.24)
        parts += bent_rod([(0, 0.03, 0), (-bend, height * 0.55, 0), (x, height, 0)], stem)
        tall, wide = tall * 0.75, wide * 0.8
    else:
        parts.append(cylinder((0, 0.02, 0), stem, height))
    y = height - tall * 0.2
    if shade == "dome":
        parts.append(hollow_dome((x, y, 0), wide, tall, thick))
        parts.append(rod((x, height, 0), (x, y + tall - thick, 0), stem))
    else:
        small = wide * (dice.between(0.45, 0.7) if shade == "conical" else dice.between(0.9, 1.0))
        ring: Polygon = [(wide, 0.0), (small, tall), (small - thick, tall), (wide - thick, 0.0)]
        parts.append(Lathe(ring, (x, y, 0)))
        # Spokes hold the shade.
        parts.append(rod((x, height, 0), (x, y + tall * 0.62, 0), stem))
        reach = small + (wide - small) * 0.38 - thick * 0.5 - stem * 0.9
        hold = y + tall * 0.62
        parts += [rod((x - reach, hold, 0), (x + reach, hold, 0), stem * 0.9)]
        parts += [rod((x, hold, -reach), (x, hold, reach), stem * 0.9)]
    caption = f"a {kind} lamp with a {shade} shade on a {base} base"
    return Design(parts, caption, {"kind": kind, "shade": shade, "base": base})


def sofa(dice: Dice) -> Design:
    seats = dice.count(1, 3)
    arms = dice.pick("boxy", "round", "none")
    w, d = 0.3 * seats + dice.between(0.05, 0.15), dice.between(0.38, 0.46)
    low, seat = dice.between(0.06, 0.14), dice.between(0.14, 0.2)
    legs = dice.chance(0.6)
    bottom = low if legs else 0.0
    r = dice.between(0.01, 0.04)
    level = bottom + seat
    parts: list[Part] = [Box((0, bottom + seat / 2, 0), (w, seat / 2, d), r)]
    for i in range(seats):
        wide = w / seats
        x = -w + wide * (2 * i + 1)
        parts.append(Box((x, level + 0.045, 0.06), (wide - 0.004, 0.07, d - 0.06), 0.045))
    back, lean = dice.between(0.32, 0.46), dice.between(0.0, 0.2)
    half = back / 2
    middle = (0.0, level + half - 0.05, -d + 0.07 - half * lean)
    parts.append(Box(middle, (w, half + 0.05, 0.085), 0.05, turned(0, -lean)))
    rise = dice.between(0.14, 0.24)
    for side in (-1, 1):
        x = side * (w + 0.05)
        if arms == "boxy":
            parts.append(Box((x, bottom + (seat + rise) / 2, 0), (0.075, (seat + rise) / 2, d), r))
        elif arms == "round":
            parts.append(Box((x, bottom + (seat + rise) / 2 - 0.03, 0), (0.06, (seat + rise) / 2 - 0.03, d - 0.01), r))
            parts.append(rod((x, level + rise - 0.03, -d + 0.09), (x, level + rise - 0.03, d - 0.09), 0.09))
    if legs:
        out = 0.04 if arms != "none" else -0.06
        for x, z in corners(w + out, d - 0.07):
            parts.append(rod((x, low + 0.04, z), (x, 0.03, z), 0.036, 0.028))
    chaise = seats > 1 and dice.chance(0.2)
    if chaise:
        wide = w / seats
        parts.append(
            Box((-w + wide, bottom + seat / 2, d + 0.2), (wide, seat / 2, 0.25), r),
        )
        parts.append(Box((-w + wide, level + 0.045, d + 0.18), (wide - 0.004, 0.07, 0.26), 0.045))
        parts += (
            [
                rod((x, low + 0.04, d + 0.36), (x, 0.03, d + 0.36), 0.036, 0.028)
                for x in (-w + 0.07, -w + 2 * wide - 0.07)
            ]
            if legs
            else []
        )
    name = {1: "an armchair" if arms != "none" else "a low chair", 2: "a sofa for two", 3: "a sofa for three"}[seats]
    caption = f"{name} with {'no' if arms == 'none' else arms} arms{', on legs' if legs else ''}{', with a chaise' if chaise else ''}"
    return Design(
        parts,
        caption,
        {"seats": str(seats), "arms": arms, "legs": "yes" if legs else "no", "chaise": "yes" if chaise else "no"},
    )


def bed(dice: Dice) -> Design:
    width = dice.pick("single", "double")
    head = dice.pick("panel", "slatted", "arched")
    w = dice.between(0.42, 0.5) if width == "single" else dice.between(0.68, 0.82)
    d, low = dice.between(0.95, 1.05), dice.between(0.12, 0.28)
    frame, mattress = dice.between(0.05, 0.08), dice.between(0.08, 0.12)
    t = 0.042
    level = low + 2 * frame
    parts: list[Part] = [Box((0, low + frame, 0), (w, frame, d))]
    parts.append(Box((0, level + mattress - 0.03, 0.02), (w - 0.035, mattress, d - 0.05), 0.06))
    top = level + 2 * mattress - 0.03
    pillows = 1 if width == "single" else dice.count(1, 2)
    for x in spread(-w * 0.48, w * 0.48, pillows) if pillows > 1 else [0.0]:
        parts.append(Box((x, top + 0.03, -d + 0.3), (0.3 if pillows == 1 else w * 0.4, 0.06, 0.16), 0.055))
    rise = top + dice.between(0.2, 0.4)
    z = -d - t + OVERLAP

    def board(kind: str, z: float, rise: float) -> list[Part]:
        posts: list[Part] = [Box((side * (w - t), rise / 2, z), (t, rise / 2, t)) for side in (-1, 1)]
        if kind == "panel":
            return [*posts, Box((0, (rise + low) / 2, z), (w - t, (rise - low) / 2 - 0.01, t * 0.8))]
        if kind == "slatted":
            rails: list[Part] = [Box((0, rise - 0.06, z), (w - t, 0.045, t * 0.8))]
            bars = [
                Box((x, (rise + low) / 2, z), (t * 0.8, (rise - low) / 2 - 0.03, t * 0.8))
                for x in spread(-w * 0.62, w * 0.62, 4)
            ]
            return [*posts, *rails, *bars]
        steps = [math.pi * i / 14 for i in range(15)]
        outline = [(w * math.cos(a), low + (rise - low) * (0.6 + 0.4 * math.sin(a))) for a in steps]
        return [
            Prism([(w, low), *outline, (-w, low)], t, (0, 0, z)),
            *[Box((s * (w - t), low / 2 + 0.02, z), (t, low / 2 + 0.02, t)) for s in (-1, 1)],
        ]

    parts += board(head, z, rise)
    foot = dice.chance(0.4)
    if foot:
        parts += board("panel", -z, level + 0.2)
    else:
        parts += [Box((side * (w - t), low / 2 + 0.01, d - t), (t, low / 2 + 0.01, t)) for side in (-1, 1)]
    caption = (
        f"a {width} bed with {'an' if head == 'arched' else 'a'} {head} headboard{' and a footboard' if foot else ''}"
    )
    return Design(
        parts, caption, {"width": width, "head": head, "foot": "yes" if foot else "no", "pillows": str(pillows)}
    )


def shelf(dice: Dice) -> Design:
    boards = dice.count(2, 5)
    back = dice.chance(0.5)
    w, d = dice.between(0.28, 0.5), dice.between(0.14, 0.22)
    h = dice.between(0.3, 0.36) * boards
    t = 0.026
    feet = dice.chance(0.4)
    up = 0.1 if feet else 0.0
    parts: list[Part] = [Box((side * (w - t), up + h / 2, 0), (t, h / 2, d)) for side in (-1, 1)]
    levels = spread(up + t, up + h - t, boards + 1)
    parts += [Box((0, y, 0), (w, t, d)) for y in levels]
    if back:
        parts.append(Box((0, up + h / 2, -d + t), (w, h / 2, t)))
    dividers = dice.count(0, 2) if w > 0.36 else 0
    if dividers:
        tall = levels[1] - levels[0]
        for i in range(boards):
            if dice.chance(0.6):
                x = dice.between(-0.3, 0.3) * w
                parts.append(Box((x, levels[i] + tall / 2, 0), (t, tall / 2, d * 0.97)))
    doors = dice.chance(0.3)
    if doors:
        tall = levels[1] - levels[0]
        for side in (-1, 1):
            parts.append(Box((side * w * 0.5, levels[0] + tall / 2, d), (w * 0.47, tall / 2 - 0.01, t)))
            knob = (side * 0.08, levels[0] + tall / 2, d + t + 0.01)
            parts.append(rod(knob, knob, 0.028))
    if feet:
        parts += [rod((x, up + 0.02, z), (x, 0.03, z), 0.036, 0.03) for x, z in corners(w - 0.05, d - 0.05)]
    caption = f"a shelf of {boards} compartments{' with a back' if back else ', open'}{', with doors' if doors else ''}{', on feet' if feet else ''}"
    return Design(
        parts,
        caption,
        {
            "boards": str(boards),
            "back": "yes" if back else "no",
            "doors": "yes" if doors else "no",
            "feet": "yes" if feet else "no",
        },
    )
