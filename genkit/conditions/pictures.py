"""One picture of the shape, shaded or drawn in lines, read by an encoder that is trained along or by one of transformers."""

from __future__ import annotations

import functools
import hashlib
import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from genkit import files, registry
from genkit.conditions.encoders import open_encoder
from genkit.conditions.held_out import held_out, of_class
from genkit.conditions.refusing import refuse
from genkit.errors import GenkitError, UsageError
from genkit.interfaces import Cond
from genkit.meshes.lines import outlined
from genkit.meshes.mesh import Mesh, normalised
from genkit.meshes.pictures import DISTANCE
from genkit.meshes.render import Camera, orbit
from genkit.meshes.shading import portrait
from genkit.rng import Rng

VERSION = 1  # of what is drawn; raise it when any picture changes
_PAPER = 0.04  # ink below this is paper: scans and JPEGs are never quite white
_MARGIN = 1 / 16  # of the side, left free around what is drawn
_KEPT = 1 << 29  # bytes of pictures held in memory


class Pictures:
    """cond["picture"] [B, 1, size, size], ink from 0 = white paper to 1, which the generator reads itself; or cond["context"] [B, k, E], what an encoder of
    transformers says of it. A picture without ink is nothing. See genkit.interfaces.Condition.

    While training, a sample is shown one of `views` pictures of its shape, which one is a function of `seed` and its position in the run. They are drawn when
    the shape first occurs, and kept in $GENKIT_CACHE (by default ~/.cache/genkit). Whatever is drawn, by us or by a user, is cut out and brought to the middle
    of the picture, as large as fits. While sampling without pictures those of held-out shapes of the class are shown.

    Args:
        kind: "shaded", "sketch" = lines alone, or "both", by turns.
        encoder: "patches", trained together with the generator; else what transformers opens as a model of images (DINOv2, CLIP), a folder or a name. It stays
            as it is; its class token and its patches, averaged over cells, are the context.
        size: pixels along a side; of encoder=patches, cells times a power of 2.
        cells: along a side, of which each is a token.
        views: pictures of every shape.
        azimuth, elevation: degrees from where a shape is looked at, evenly within; 0, 0 is its front.
        resolution: of data.type=shapes, cells along a side of the mesh that is drawn.

    Raises: UsageError for values out of range, data that are no shapes, and an encoder that cannot be opened.
    """

    def __init__(
        self,
        *,
        kind: Literal["shaded", "sketch", "both"] = "both",
        encoder: str = "patches",
        size: int = 64,
        cells: int = 4,
        views: int = 8,
        azimuth: tuple[float, float] = (-180.0, 180.0),
        elevation: tuple[float, float] = (0.0, 40.0),
        resolution: int = 64,
        seed: int = 0,
        class_names: Sequence[str] = (),
        data: Mapping[str, Any] | None = None,
    ):
        for name, value, least in (
            ("size", size, 16),
            ("cells", cells, 1),
            ("views", views, 1),
            ("resolution", resolution, 16),
        ):
            if value < least:
                raise UsageError(f"condition.{name}={value} must be at least {least}")
        for name, (low, high), most in (("azimuth", azimuth, 360), ("elevation", elevation, 85)):
            if not -most <= low <= high <= most:
                raise UsageError(f"condition.{name}={[low, high]} must rise, from -{most} to {most} degrees at most")
        if data is not None and not hasattr(registry.find("data", data["type"]), "mesh"):
            raise UsageError(f"condition.type=pictures draws shapes, data.type=shapes or meshes; found {data['type']}")
        self.kind, self.size, self.cells, self.views, self.resolution = kind, size, cells, views, resolution
        self.ranges = tuple(azimuth), tuple(elevation)
        self.class_names, self.seed, self.data = tuple(class_names), seed, data
        self.encoder = None if encoder == "patches" else Encoder(encoder, cells)
        self.takes: dict[str, int] = {"num_classes": 0}
        self.takes |= (
            {"picture_size": size, "picture_cells": cells}
            if self.encoder is None
            else {"context_dim": self.encoder.dim}
        )
        self._base = Rng.at(seed, 0, 1).seeds
        self._pictures = functools.lru_cache(maxsize=max(1, _KEPT // (views * size * size)))(self._read)

    # While training

    def of_batch(self, batch: Mapping[str, Any]) -> Cond:
        """Pictures of the shapes of a batch, by "key" or "index" and "position"."""
        numbers = self._numbers(batch)
        position = batch["position"] if "position" in batch else batch["index"]
        rng = Rng((self._base + position.cpu()) & 0x7FFFFFFFFFFFFFFF)
        views = rng.fork("view").integers(self.views).tolist()
        ink = torch.stack([self.pictures("train", n)[v] for n, v in zip(numbers, views, strict=True)])
        return self._cond(ink, batch["label"].device)

    def pictures(self, split: str, number: int) -> Tensor:
        """All views of a shape, [views, 1, size, size] in [0, 1]; split "train" is the data of the recipe, "held out" see `held_out`."""
        return self._pictures(split, number)[:, None].float() / 255

    @functools.cached_property
    def shapes(self) -> Any:
        """The data that are trained on."""
        if self.data is None:
            raise UsageError(
                "this generator was saved without its data; give pictures (genkit sample RUN --image FILE)"
            )
        try:
            return registry.build("data", dict(self.data))
        except UsageError as error:
            raise UsageError(
                f"{error}; pictures are drawn of these shapes, or given (genkit sample RUN --image FILE)"
            ) from None

    @functools.cached_property
    def held_out(self) -> Any:
        """The split val of the same data; the data themselves where there is none."""
        self.shapes  # noqa: B018 - says what is missing
        return held_out(self.data or {})

    def _numbers(self, batch: Mapping[str, Any]) -> list[int]:
        """Of the samples in the data: a cache of tokens leaves out files that cannot be used."""
        if not hasattr(self.shapes, "keys"):
            return batch["index"].tolist()
        return [self._number_of[key] for key in batch["key"]]

    @functools.cached_property
    def _number_of(self) -> dict[str, int]:
        return {key: i for i, key in enumerate(self.shapes.keys)}

    def _read(self, split: str, number: int) -> Tensor:
        """[views, size, size] uint8, from the cache or drawn now."""
        shapes = self.shapes if split == "train" else self.held_out
        how = (VERSION, self.kind, self.size, self.views, self.ranges, self.resolution, self.seed)
        name = repr((how, shapes.info.fingerprint, number)).encode()
        root = Path(os.environ.get("GENKIT_CACHE", "~/.cache/genkit")).expanduser() / "pictures"
        place = root / f"{hashlib.blake2b(name, digest_size=12).hexdigest()}.npy"
        try:
            return torch.from_numpy(np.load(place, allow_pickle=False).reshape(self.views, self.size, self.size))
        except (OSError, ValueError, EOFError):  # not there, or cut off: draw it
            pass
        mesh = shapes.mesh(number) if hasattr(shapes, "keys") else shapes.mesh(number, self.resolution)
        drawn = (self._drawn(mesh, number, split) * 255).round().to(torch.uint8)
        buffer = io.BytesIO()
        np.save(buffer, drawn.numpy(), allow_pickle=False)
        try:
            files.write_bytes(place, buffer.getvalue())
        except OSError as error:
            raise GenkitError(
                f"{place} cannot be written: {error.strerror or error}; set GENKIT_CACHE to another folder"
            ) from None
        return drawn

    def _drawn(self, mesh: Mesh, number: int, split: str) -> Tensor:
        """[views, size, size] in [0, 1]: cameras, strength of the ink and width of the lines belong to the shape's number and the view."""
        numbers = Rng.at(self.seed, number, 1).fork(split).uniform(self.views, 3)[0]
        fitted = normalised(mesh, to="sphere", size=1.0)
        found = []
        for view, (a, e, strength) in enumerate(numbers.tolist()):
            azimuth, elevation = (low + u * (high - low) for u, (low, high) in zip((a, e), self.ranges, strict=True))
            camera = _filled(fitted, orbit(azimuth, elevation, DISTANCE))
            if self.kind == "sketch" or (self.kind == "both" and view % 2):
                ink = outlined(fitted, camera, self.size, width=(1 + strength) * self.size / 64)
            else:
                grey = (1 - portrait(fitted, camera, self.size).mean(0)) / 2
                ink = (grey * (0.7 + 0.8 * strength)).clamp(0, 1)
            found.append(framed(ink, self.size))
        return torch.stack(found)

    # While sampling

    def of_request(
        self,
        labels: Tensor,
        rng: Rng,
        *,
        texts: Sequence[str] | None = None,
        database: Any = None,
        images: Sequence[Any] | None = None,
    ) -> Cond:
        """Of the pictures that are given, one for each sample (see `read`); else of held-out shapes of the classes."""
        refuse("pictures", texts=(texts, "give them by --image"), database=(database, "give them by --image"))
        if images is None:
            return self._cond(self.chosen(labels, rng), labels.device)
        if len(images) != len(labels):
            raise UsageError(f"{len(images)} pictures for {len(labels)} samples; give one for each")
        read = {key: self.read(image) for key, image in {id(image): image for image in images}.items()}
        return self._cond(torch.stack([read[id(image)] for image in images]), labels.device)

    def read(self, image: Any) -> Tensor:
        """Ink [1, size, size] of a picture: a path, a PIL image, or a tensor [C, Y, X] in [-1, 1]. Something dark on white or transparent ground.

        Raises: UsageError for what is none, naming it.
        """
        name = str(image) if isinstance(image, str | Path) else "the picture"
        grey = image if isinstance(image, Tensor) else opened(image, name)
        if grey.ndim != 3 or not grey.isfinite().all():
            raise UsageError(f"{name} must be [C, Y, X] of finite numbers in [-1, 1], found {list(grey.shape)}")
        ink = ((1 - grey.float().mean(0)) / 2).clamp(0, 1)
        border = torch.cat([ink[0], ink[-1], ink[:, 0], ink[:, -1]])
        if float(border.median()) > 0.5:
            raise UsageError(f"{name} has a dark ground; show a thing on white or transparent ground")
        if not (ink > _PAPER).any():
            raise UsageError(f"{name} is empty: nothing on it is darker than paper")
        return framed(ink, self.size)[None]

    def chosen(self, labels: Tensor, rng: Rng) -> Tensor:
        """Ink [B, 1, size, size] of a held-out shape of each class, -1 = of any; which one, and the view, belong to the stream.

        Raises: UsageError for a class without one.
        """
        rng = rng.fork("picture")
        at, views = rng.uniform().cpu().double().tolist(), rng.integers(self.views).tolist()
        found = []
        for label, u, view in zip(labels.tolist(), at, views, strict=True):
            own = of_class(self.held_out, label, self.class_names)
            first = int(u * len(own))
            found.append(self._first_good([*own[first:], *own[:first]])[view])
        return torch.stack(found)

    def _first_good(self, numbers: Sequence[int]) -> Tensor:
        for i, number in enumerate(numbers):
            try:
                return self.pictures("held out", number)
            except GenkitError:
                if i + 1 == len(numbers):
                    raise
        raise AssertionError

    def names(self, database: Any = None) -> tuple[str, ...]:
        return self.class_names

    def classes(self, database: Any = None) -> list[int]:
        return list(range(len(self.class_names)))

    def _cond(self, ink: Tensor, device: torch.device) -> Cond:
        if self.encoder is None:
            return {"picture": ink.to(device)}
        return {"context": self.encoder(ink).to(device)}


def _filled(mesh: Mesh, camera: Camera) -> Camera:
    """The camera with an angle at which the mesh just fits: few pixels are drawn that are cut off later."""
    right, up, back = ((mesh.vertices - camera.eye) @ camera.axes.T).unbind(1)
    reach = float((torch.maximum(right.abs(), up.abs()) / -back).max())
    return Camera(camera.eye, math.degrees(2 * math.atan(reach * 1.03)))


def framed(ink: Tensor, size: int) -> Tensor:
    """What is drawn on paper [Y, X], cut out, in the middle of a square [size, size], as large as fits. Empty paper stays empty."""
    is_ink = ink > _PAPER
    if not is_ink.any():
        return ink.new_zeros(size, size)
    (top, bottom), (left, right) = ((int(at.min()), int(at.max()) + 1) for at in is_ink.nonzero().unbind(1))
    cut = ink[top:bottom, left:right]
    inner = size - 2 * max(1, round(size * _MARGIN))
    scale = inner / max(cut.shape)
    height, width = (max(1, round(length * scale)) for length in cut.shape)
    small = interpolate(cut[None, None], size=(height, width), mode="bilinear", antialias=True, align_corners=False)
    out = ink.new_zeros(size, size)
    y, x = (size - height) // 2, (size - width) // 2
    out[y : y + height, x : x + width] = small[0, 0].clamp(0, 1)
    return out


def opened(image: Any, name: str) -> Tensor:
    """A file or PIL image as grey [1, Y, X] in [-1, 1], upright, transparent places white. Raises UsageError for what cannot be read."""
    from PIL import Image, ImageOps

    try:
        picture = Image.open(image) if isinstance(image, str | Path) else image
        with picture:
            whole = ImageOps.exif_transpose(picture).convert("RGBA")
        paper = Image.new("RGBA", whole.size, "white")
        grey = Image.alpha_composite(paper, whole).convert("L")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"{name} cannot be read as a picture: {reason}") from None
    return torch.from_numpy(np.asarray(grey).astype(np.float32) / 127.5 - 1)[None]


class Encoder:
    """Ink [B, 1, Y, X] -> [B, k, E] of a frozen image encoder of transformers: its class token where it has one, and its patches averaged over cells^2 parts;
    0 for a picture without ink.

    Args:
        name: a folder with a model and its processor, or the name of one in transformers' cache.
    """

    def __init__(self, name: str, cells: int):
        self.processor, model = open_encoder(name, "image")
        model = getattr(model, "vision_model", model)  # models of pairs (CLIP) have a part that looks
        self.model, self.cells = model.eval().requires_grad_(False), cells
        self.dim = int(self.model.config.hidden_size)
        self._kept: dict[bytes, Tensor] = {}  # pictures come again in every epoch

    @torch.no_grad()
    def __call__(self, ink: Tensor) -> Tensor:
        keys = [hashlib.blake2b(row.numpy().tobytes(), digest_size=16).digest() for row in ink]
        new = [i for i, key in enumerate(keys) if key not in self._kept and keys.index(key) == i]
        if new:
            if len(self._kept) + len(new) > max(len(ink), _KEPT // (4 * self.dim * (self.cells**2 + 1))):
                self._kept.clear()
                return self(ink)
            states = self._states(ink[new]) * (ink[new].flatten(1) > 0).any(1)[:, None, None]
            self._kept |= {keys[i]: row for i, row in zip(new, states, strict=True)}
        return torch.stack([self._kept[key] for key in keys])

    def _states(self, ink: Tensor) -> Tensor:
        paper = ((1 - ink) * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
        given = self.processor(images=list(paper.permute(0, 2, 3, 1).numpy()), return_tensors="pt")
        states = self.model(pixel_values=given["pixel_values"]).last_hidden_state.float()
        if states.ndim == 4:  # of a convolutional net: [B, E, Y, X]
            return adaptive_avg_pool2d(states, self.cells).flatten(2).transpose(1, 2)
        side = math.isqrt(states.shape[1])
        rows = (
            states[:, -side * side :].transpose(1, 2).unflatten(2, (side, side))
        )  # [B, E, Y, X], the patches come last
        pooled = adaptive_avg_pool2d(rows, self.cells).flatten(2).transpose(1, 2)
        return torch.cat([states[:, :1], pooled], 1) if states.shape[1] > side * side else pooled
