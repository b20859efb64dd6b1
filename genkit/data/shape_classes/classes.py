"""Furniture and things, each class a function from random numbers to parts: what the dataset `shapes` is made of.

y is up, the front looks towards +z, sizes are those of the thing in metres or so; the dataset scales everything to one size. Parts that meet overlap a
little, and none is thinner than three cells of a grid of 64 along the scaled thing.
"""

from __future__ import annotations

from collections.abc import Callable

from genkit.data.shape_classes.design import Design, Dice
from genkit.data.shape_classes.furniture import bed, chair, lamp, shelf, sofa, table
from genkit.data.shape_classes.tools import tool
from genkit.data.shape_classes.vehicles import airplane, car, rocket
from genkit.data.shape_classes.vessels import bottle, mug

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
