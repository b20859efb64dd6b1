"""Furniture and things, each class a function from random numbers to parts: what the dataset `shapes` is made of.

y is up, the front looks towards +z, sizes are those of the thing in metres or so; the dataset scales everything to one size. Parts that meet overlap a
little, and none is thinner than three cells of a grid of 64 along the scaled thing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

from genkit.meshes.solids import Box, Cone, Lathe, Part, Polygon, Prism, Vector, turned

_OVERLAP = 0.012


class Dice:
    """Random choices in a fixed order from numbers in [0, 1)."""

    def __init__(self, numbers: list[float]) -> None:
        self._numbers = iter(numbers)

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * next(self._numbers)

    def pick(self, *options: str) -> str:
        return options[int(next(self._numbers) * len(options))]

    def count(self, low: int, high: int) -> int:
        """low .. high, both included."""
        return low + int(next(self._numbers) * (high - low + 1))

    def chance(self, share: float) -> bool:
        return next(self._numbers) < share


@dataclass
class Design:
    """What a class function makes.

    Attributes:
        parts: of the solid.
        caption: a few words about it.
        style: the discrete choices by name, for conditioning and for counting which combinations a model covers.
    """

    parts: list[Part]
    caption: str
    style: dict[str, str] = field(default_factory=dict)


def _cylinder(bottom: Vector, radius: float, height: float, top: float | None = None) -> Lathe:
    """Upright, from the middle of its bottom; `top` = radius at the upper end."""
    upper = radius if top is None else top
    return Lathe([(0.0, 0.0), (radius, 0.0), (upper, height), (0.0, height)], bottom)


def _dome(center: Vector, radius: float, height: float, thickness: float, steps: int = 10) -> Lathe:
    """Half a hollow ellipsoid, open below."""
    angles = [math.pi / 2 * i / steps for i in range(steps + 1)]
    outer = [(radius * math.cos(a), height * math.sin(a)) for a in angles]
    inner = [((radius - thickness) * math.cos(a), (height - thickness) * math.sin(a)) for a in reversed(angles)]
    return Lathe([(max(r, 0.0) if r > 1e-9 else 0.0, y) for r, y in outer + inner], center)


def _rod(a: Vector, b: Vector, radius: float, end: float | None = None) -> Cone:
    return Cone(a, b, radius, radius if end is None else end)


def _arc(points: list[Vector], radius: float) -> list[Part]:
    """A bent rod through points."""
    return [_rod(a, b, radius) for a, b in itertools.pairwise(points)]


def _corners(x: float, z: float) -> list[tuple[float, float]]:
    return [(-x, -z), (x, -z), (-x, z), (x, z)]


def _spread(low: float, high: float, count: int) -> list[float]:
    """`count` places between two ends, the ends included."""
    return [low + (high - low) * i / max(1, count - 1) for i in range(count)] if count > 1 else [(low + high) / 2]


def _smooth(points: Polygon, steps: int = 5) -> list[tuple[float, float]]:
    """A line through points, rounded (Catmull and Rom 1974)."""
    line = [points[0], *points, points[-1]]
    found = [points[0]]
    for p0, p1, p2, p3 in zip(line, line[1:], line[2:], line[3:], strict=False):
        for i in range(1, steps + 1):
            t = i / steps
            weights = (
                (-t + 2 * t**2 - t**3) / 2,
                (2 - 5 * t**2 + 3 * t**3) / 2,
                (t + 4 * t**2 - 3 * t**3) / 2,
                (-(t**2) + t**3) / 2,
            )
            x, y = (sum(w * p[a] for w, p in zip(weights, (p0, p1, p2, p3), strict=True)) for a in (0, 1))
            found.append((max(x, 0.01), y))
    return found


def _standing(dice: Dice, kind: str, x: float, z: float, height: float) -> list[Part]:
    """What holds up a plate whose lower side is at `height`: legs of a kind, at most x and z from the middle."""
    top = height + _OVERLAP
    thick = dice.between(0.026, 0.042)
    if kind == "post":
        arms = dice.count(3, 5)
        foot = min(x, z) * 1.05
        hub = height * dice.between(0.14, 0.22)
        angles = [2 * math.pi * (i + 0.25) / arms for i in range(arms)]
        feet = [_rod((0, hub, 0), (foot * math.sin(a), thick, foot * math.cos(a)), thick * 1.1, thick) for a in angles]
        return [_cylinder((0, hub * 0.5, 0), thick * 1.3, top - hub * 0.5), *feet]
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
            rails += _arc(path, thick)
        return rails
    if kind == "panels":
        return [Box((side, top / 2, 0), (thick, top / 2, z)) for side in (-x, x)]
    splay = dice.between(0.12, 0.2) if kind == "splayed" else 0.0
    taper = dice.between(0.65, 1.0)
    legs: list[Part] = []
    for sx, sz in _corners(x, z):
        if kind == "square":
            legs.append(Box((sx, top / 2, sz), (thick, top / 2, thick)))
        else:
            end: Vector = (sx * (1 + splay), thick * taper, sz * (1 + splay))
            legs.append(_rod((sx, top - thick, sz), end, thick * 1.1, thick * taper * 1.1))
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
        parts.append(_cylinder((0, h - t, 0), w, 2 * t, w * dice.between(0.92, 1.0)))
        reach = (w * 0.62, w * 0.62)
    parts += _standing(dice, legs, *reach, h - t)
    if back != "none":
        rise, lean = dice.between(0.3, 0.56), dice.between(0.0, 0.22)
        thick = dice.between(0.024, 0.036)
        wide = w if seat == "square" else w * 0.75
        z0 = -(d if seat == "square" else w * 0.72) + thick

        def at(x: float, y: float) -> Vector:
            return (x, h + y, z0 - y * lean)

        tilt = turned(0, -math.atan(lean))
        posts = [_rod(at(side * (wide - thick), 0), at(side * (wide - thick), rise), thick) for side in (-1, 1)]
        if back == "panel":
            low = dice.between(0.0, 0.45) * rise
            middle = at(0, (low + rise) / 2)
            parts.append(Box(middle, (wide, (rise - low) / 2 * math.hypot(1, lean), thick), thick * 0.7, tilt))
            parts += posts if low > 0.02 else []
            if low <= 0.02:
                parts.append(Box(at(0, rise * 0.1), (wide, rise * 0.15, thick), thick * 0.7, tilt))
        elif back == "slatted":
            parts += [*posts, _rod(at(-wide + thick, rise), at(wide - thick, rise), thick)]
            bars = dice.count(2, 4)
            places = [(-1 + 2 * (i + 1) / (bars + 1)) * (wide - thick) for i in range(bars)]
            parts += [_rod(at(x, 0), at(x, rise), thick * 0.85) for x in places]
        elif back == "ladder":
            rungs = dice.count(2, 3)
            parts += posts
            for y in _spread(rise * 0.38, rise - 0.02, rungs):
                parts.append(Box(at(0, y), (wide - thick, 0.028, thick * 0.85), thick * 0.5, tilt))
        else:
            steps = 12
            angles = [math.pi * (i / steps) for i in range(steps + 1)]
            arch = [at((wide - thick) * math.cos(a), rise * (0.55 + 0.45 * math.sin(a))) for a in angles]
            parts += [*_arc([at(wide - thick, 0), *arch, at(-wide + thick, 0)], thick)]
    arms = back != "none" and seat == "square" and dice.chance(0.35)
    if arms:
        y, thick = h + dice.between(0.16, 0.22), dice.between(0.022, 0.03)
        for side in (-1, 1):
            x = side * (w - thick)
            parts += [
                _rod((x, h, d * 0.7), (x, y, d * 0.7), thick),
                _rod((x, y, d * 0.75), (x, y, z0 - (y - h) * lean), thick),
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
        parts.append(_cylinder((0, h - t, 0), w * dice.between(0.9, 1.0), 2 * t, w))
        reach = (w * 0.6, w * 0.6)
    else:
        corners = [2 * math.pi * i / 28 for i in range(28)]
        outline = [(w * math.cos(a), d * math.sin(a)) for a in corners]
        parts.append(Prism(outline, t, (0, h, 0), turned(0, -math.pi / 2)))
        reach = (w * 0.6, d * 0.6)
    parts += _standing(dice, legs, *reach, h - t)
    apron = legs in ("straight", "square") and dice.chance(0.4)
    if apron:
        tall = dice.between(0.04, 0.07)
        y = h - t - tall + _OVERLAP
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
    rod = dice.between(0.02, 0.028) * (1.5 if kind == "floor" else 1.0)
    height = dice.between(0.9, 1.3) if kind == "floor" else dice.between(0.32, 0.55)
    base = dice.pick("disc", "box", "dome")
    foot = dice.between(0.13, 0.19) * (1.2 if kind == "floor" else 1.0)
    parts: list[Part] = []
    if base == "disc":
        parts.append(_cylinder((0, 0, 0), foot, 0.05, foot * dice.between(0.7, 1.0)))
    elif base == "box":
        parts.append(Box((0, 0.03, 0), (foot * 0.85, 0.03, foot * 0.85), 0.008))
    else:
        steps = [math.pi / 2 * i / 8 for i in range(9)]
        dome = [(foot * math.cos(a) if i < 8 else 0.0, foot * 0.55 * math.sin(a)) for i, a in enumerate(steps)]
        parts.append(Lathe([(0.0, 0.0), *dome]))
    if kind == "table" and dice.chance(0.5):
        belly = dice.between(0.06, 0.11)
        parts.append(_rod((0, height * 0.35, 0), (0, height * 0.6, 0), belly, belly * dice.between(0.5, 0.9)))
    x = 0.0
    if kind == "desk":
        bend = dice.between(0.12, 0.22)
        x = dice.between(0.1, 0.24)
        parts += _arc([(0, 0.03, 0), (-bend, height * 0.55, 0), (x, height, 0)], rod)
        tall, wide = tall * 0.75, wide * 0.8
    else:
        parts.append(_cylinder((0, 0.02, 0), rod, height))
    y = height - tall * 0.2
    if shade == "dome":
        parts.append(_dome((x, y, 0), wide, tall, thick))
        parts.append(_rod((x, height, 0), (x, y + tall - thick, 0), rod))
    else:
        small = wide * (dice.between(0.45, 0.7) if shade == "conical" else dice.between(0.9, 1.0))
        ring: Polygon = [(wide, 0.0), (small, tall), (small - thick, tall), (wide - thick, 0.0)]
        parts.append(Lathe(ring, (x, y, 0)))
        # Spokes hold the shade.
        parts.append(_rod((x, height, 0), (x, y + tall * 0.62, 0), rod))
        reach = small + (wide - small) * 0.38 - thick * 0.5 - rod * 0.9
        hold = y + tall * 0.62
        parts += [_rod((x - reach, hold, 0), (x + reach, hold, 0), rod * 0.9)]
        parts += [_rod((x, hold, -reach), (x, hold, reach), rod * 0.9)]
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
            parts.append(_rod((x, level + rise - 0.03, -d + 0.09), (x, level + rise - 0.03, d - 0.09), 0.09))
    if legs:
        out = 0.04 if arms != "none" else -0.06
        for x, z in _corners(w + out, d - 0.07):
            parts.append(_rod((x, low + 0.04, z), (x, 0.03, z), 0.036, 0.028))
    chaise = seats > 1 and dice.chance(0.2)
    if chaise:
        wide = w / seats
        parts.append(
            Box((-w + wide, bottom + seat / 2, d + 0.2), (wide, seat / 2, 0.25), r),
        )
        parts.append(Box((-w + wide, level + 0.045, d + 0.18), (wide - 0.004, 0.07, 0.26), 0.045))
        parts += (
            [
                _rod((x, low + 0.04, d + 0.36), (x, 0.03, d + 0.36), 0.036, 0.028)
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
    for x in _spread(-w * 0.48, w * 0.48, pillows) if pillows > 1 else [0.0]:
        parts.append(Box((x, top + 0.03, -d + 0.3), (0.3 if pillows == 1 else w * 0.4, 0.06, 0.16), 0.055))
    rise = top + dice.between(0.2, 0.4)
    z = -d - t + _OVERLAP

    def board(kind: str, z: float, rise: float) -> list[Part]:
        posts: list[Part] = [Box((side * (w - t), rise / 2, z), (t, rise / 2, t)) for side in (-1, 1)]
        if kind == "panel":
            return [*posts, Box((0, (rise + low) / 2, z), (w - t, (rise - low) / 2 - 0.01, t * 0.8))]
        if kind == "slatted":
            rails: list[Part] = [Box((0, rise - 0.06, z), (w - t, 0.045, t * 0.8))]
            bars = [
                Box((x, (rise + low) / 2, z), (t * 0.8, (rise - low) / 2 - 0.03, t * 0.8))
                for x in _spread(-w * 0.62, w * 0.62, 4)
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
    levels = _spread(up + t, up + h - t, boards + 1)
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
            parts.append(_rod(knob, knob, 0.028))
    if feet:
        parts += [_rod((x, up + 0.02, z), (x, 0.03, z), 0.036, 0.03) for x, z in _corners(w - 0.05, d - 0.05)]
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


def mug(dice: Dice) -> Design:
    body = dice.pick("straight", "tapered", "round")
    r, h = dice.between(0.3, 0.4), dice.between(0.6, 0.9)
    wall = dice.between(0.04, 0.055)
    low = {"straight": 1.0, "tapered": dice.between(0.62, 0.8), "round": dice.between(0.6, 0.75)}[body]
    bulge = 1.12 if body == "round" else (1 + low) / 2
    outer = _smooth([(r * low, 0.0), (r * bulge, h * 0.42), (r, h)], 8)
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
        parts += _arc([ends[0], *arc, ends[1]], thick)
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
        line = _smooth([(r * 0.95, 0.0), (r * 0.6, h * 0.08), (neck, h * 0.18)], 6)
        rise = h * (1 - shoulder)
        parts.append(Lathe([(0.0, -0.05), (r * 0.9, -0.05), *line, (neck, rise), (0.0, rise)], (0, h * shoulder, 0)))
    else:
        waist = dice.between(0.88, 1.05) if body == "slim" else dice.between(0.7, 0.85)
        line = _smooth(
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
        parts.append(_cylinder((0, h - 0.05, 0), neck * 1.35, 0.12))
    elif cap == "cork":
        parts.append(_rod((0, h - 0.03, 0), (0, h + 0.06, 0), neck * 0.7, neck * 0.85))
    else:
        parts.append(_cylinder((0, h - 0.04, 0), neck * 1.25, 0.045))
    caption = f"a {body} bottle{ {'cap': ' with a cap', 'cork': ' with a cork', 'open': ''}[cap] }"
    return Design(parts, caption, {"body": body, "closure": cap})


def airplane(dice: Dice) -> Design:
    wings = dice.pick("swept", "straight", "delta")
    engines = dice.pick("none", "two", "four") if wings != "delta" else dice.pick("none", "two")
    tail = dice.pick("low", "high")
    length, r = dice.between(0.75, 0.95), dice.between(0.07, 0.105)
    parts: list[Part] = [
        _rod((0, 0, -length * 0.35), (0, 0, length * 0.55), r),
        _rod((0, 0, length * 0.5), (0, -r * 0.2, length), r, r * dice.between(0.45, 0.7)),
        _rod((0, 0, -length * 0.3), (0, r * 0.5, -length), r, r * 0.42),
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
        turn = _product(turned(2, lift), turned(0, math.pi / 2))
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
                _rod(
                    (x, y - 0.075 + dihedral * abs(x), z + 0.09),
                    (x, y - 0.075 + dihedral * abs(x), z - 0.12),
                    0.062,
                    0.045,
                )
            )
    caption = f"an airplane with {wings} wings, a {tail} tail and {'no' if engines == 'none' else engines} engines"
    return Design(parts, caption, {"wings": wings, "engines": engines, "tail": tail})


def _product(a: tuple[Vector, Vector, Vector], b: tuple[Vector, Vector, Vector]) -> tuple[Vector, Vector, Vector]:
    rows = [[sum(a[i][k] * b[k][j] for k in range(3)) for j in range(3)] for i in range(3)]
    return tuple(tuple(row) for row in rows)  # type: ignore[return-value]


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
        parts.append(_rod((-w, wheel, z), (w, wheel, z), 0.035))
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
            parts.append(_rod((0, 0.1, side * (r + 0.07)), (0, h * 0.5, side * (r + 0.07)), 0.085, 0.07))
    caption = f"a rocket of {stages} stages with {fins} fins and a {nose} nose{', with boosters' if boosters else ''}"
    if stages == 1:
        caption = caption.replace("1 stages", "one stage")
    return Design(
        parts,
        caption,
        {"stages": str(stages), "fins": str(fins), "nose": nose, "boosters": "yes" if boosters else "no"},
    )


def tool(dice: Dice) -> Design:
    kind = dice.pick("hammer", "key", "spoon", "screwdriver")
    length = dice.between(0.75, 1.0)
    r = dice.between(0.04, 0.055)
    parts: list[Part] = []
    if kind == "hammer":
        head, thick = dice.between(0.2, 0.3), dice.between(0.07, 0.1)
        parts.append(_rod((0, 0, 0), (0, length, 0), r * 1.2, r * 0.9))
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
        parts += _arc(bow, thick)
        end = -ring * squash - length * 0.8
        parts.append(_rod((0, -ring * squash, 0), (0, end, 0), thick))
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
        parts.append(_rod((0, -0.02, bowl - thick * 0.6), (0, lift, length), 0.032, 0.045))
    else:
        grip = length * dice.between(0.35, 0.45)
        parts.append(_rod((0, 0, 0), (0, grip, 0), r * 1.7, r * 1.3))
        parts.append(_cylinder((0, grip * 0.9, 0), r * 0.85, length - grip * 0.7))
        flat = dice.between(0.05, 0.08)
        top = grip * 0.9 + length - grip * 0.7
        blade: Polygon = [(-r * 0.6, -0.06), (r * 0.6, -0.06), (flat, 0.06), (flat, 0.12), (-flat, 0.12), (-flat, 0.06)]
        parts.append(Prism(blade, 0.028, (0, top, 0)))
    return Design(parts, f"a {kind}", {"kind": kind})


CLASSES: dict[str, Callable[[Dice], Design]] = {
    "chair": chair,
    "table": table,
    "lamp": lamp,
    "sofa": sofa,
    "bed": bed,
    "shelf": shelf,
    "mug": mug,
    "bottle": bottle,
    "airplane": airplane,
    "car": car,
    "rocket": rocket,
    "tool": tool,
}
