"""The contracts on one page: what passes between parts. No logic.

Letters: `B` batch, `C` channels, `*grid` any of `Y X`, `F Y X`, `Z Y X`, `N` tokens, `D` width, `Q` quantiser levels, `S` codebook size,
`A` axes of the grid. Images `[B, C, Y, X]` and video `[B, C, F, Y, X]` are floats in [-1, 1]; ids `[B, Q, *grid]` are int64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

    from genkit.rng import Rng

# Everything a model is conditioned on, by name. "label": [B] int64, -1 = no label (the null class of classifier-free guidance).
# "context": [B, k, E] vectors that are attended to, neighbours or states of an encoder; "text": [B, T] int64 bytes, 0 behind the end; "picture":
# [B, 1, Y, X], ink in [0, 1]. All 0 = nothing. "said": [B, k] bool, which vectors of the context are real, whether or not the context is left out.
Cond = Mapping[str, "Tensor"]

# What lives between two calls of a model while sampling: key/values, reused context features, attention statistics.
# The sampler decides when to refresh it, the mixer (under its own layer number) what is kept.
Cache = dict[Any, Any]

# What a kind of reuse (genkit/reuse/) puts into a cache for a whole network. Modules that ask for it name the key in `heeds`.
ATTEND = "attend"  # (q, k, v [B, H, N, K], grid, valid) -> [B, H, N, K], in place of full attention
BLOCKS = "blocks"  # (number of blocks, state, run(i, state) -> state) -> state, in place of running one after the other


class Path(Protocol):
    """How much data and noise are in x_t = alpha(t) x0 + sigma(t) noise: t = 0 is data, 1 noise. See genkit/nn/paths.py."""

    least: float  # the smallest t that a model along this path knows

    def alpha(self, t: Tensor) -> Tensor: ...
    def sigma(self, t: Tensor) -> Tensor: ...
    def times(self, num_steps: int) -> Tensor: ...


class Predict(Protocol):
    """(x_t [B, C, *grid], t [] or [B]) -> (x0, noise), both shaped like x_t, and of a model with learned variances a third tensor. The one form VP, VE,
    EDM and straight flow share."""

    path: Path

    def __call__(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, ...]: ...


# (ids [B, Q, *grid], known [B, Q, *grid] bool, cache) -> logits [B, Q, *grid, S]. Where known is False the value of ids is ignored.
# A cache may say under "steps" (step from 0, number of steps) and under "known" [B] which fraction of each sample is known where only a part is passed.
PredictIds = Callable[["Tensor", "Tensor", "Cache | None"], "Tensor"]


class PredictTokens(Protocol):
    """(tokens [B, N, W], known [B, N] bool, cache) -> a function that draws some of them: (slots [B, n] int64, fraction known [B]) -> Predict on
    [B, n, W]. Continuous tokens have no logits; a network denoises each by itself."""

    def split(self, z: Tensor) -> Tensor: ...  # latents [B, C, *grid] -> tokens
    def join(self, tokens: Tensor) -> Tensor: ...  # and back
    def __call__(
        self, tokens: Tensor, known: Tensor, cache: Cache | None = None
    ) -> Callable[[Tensor, Tensor], Predict]: ...


class PredictNext(Protocol):
    """(the ids so far [B, m] in the order of drawing, cache) -> logits [B, n, S] of the n ids that are drawn next, together. The one form in which
    autoregressive models of any order - raster, depth first, scale after scale - are sampled.

    With a cache only what came since the last call with it is computed; without one all of it, with the same result. Logits may be -inf.
    """

    counts: Sequence[int]  # how many ids each step draws
    shape: tuple[int, ...]  # of the ids of one sample as a tokenizer has them: (Q, *grid)
    codebook_size: int

    def __call__(self, ids: Tensor, cache: Cache | None = None) -> Tensor: ...
    def to_sequence(self, ids: Tensor) -> Tensor: ...  # [B, *shape] -> [B, sum(counts)]
    def to_ids(self, sequence: Tensor) -> Tensor: ...  # back
    def repeated(self, times: int) -> PredictNext: ...  # of a batch in which each sample stands so many times in a row
    def is_over(self, ids: Tensor) -> bool: ...  # whether nothing that may still be drawn counts


# As PredictIds, but of every place comes a distribution of one vector, the sum of the codes of its unknown levels (genkit/nn/mixture.py).
PredictMixture = Callable[["Tensor", "Tensor", "Cache | None"], Any]


class PredictTree(Protocol):
    """Where a batch of octrees grows depth by depth; see genkit/samplers/octree_masked.py."""

    depths: int

    def begin(self, start: Any) -> None: ...
    def logits(self, values: Tensor, known: Tensor) -> Tensor: ...
    def light(self, values: Tensor, known: Tensor, chosen: Tensor, keeps_condition: bool = False) -> Tensor: ...
    def finish(self, values: Tensor) -> None: ...
    def result(self) -> Any: ...


OnStep = Callable[[int, int, "Tensor"], None]  # (step from 0, number of steps, state)


@dataclass(frozen=True)
class Layout:
    """Where tokens sit. A mixer sees tokens and a Layout, never an image."""

    coords: Tensor  # [B or 1, N, A] float, in units of one token
    grid: tuple[int, ...] | None  # dense row-major grid, else None
    valid: Tensor | None = None  # [B, N] bool, False = padding (mixed sizes)
    tree: Any = None  # packed octree nodes: B = 1, N = M


@dataclass
class Encoded:
    """What a tokenizer makes of a batch."""

    z: Tensor  # [B, C, *grid], unit variance
    ids: Tensor | None  # [B, Q, *grid] int64; None for continuous tokenizers
    losses: dict[str, Tensor] = field(default_factory=dict)  # name -> [B]


@dataclass(frozen=True)
class DataInfo:
    """What a dataset knows of itself; everything a model must fit to is read from here and never typed twice."""

    shape: tuple[int, ...]  # of one sample: (C, Y, X)
    class_names: tuple[str, ...]  # empty = unlabelled
    fingerprint: str  # hex; changes when the samples or their order change
    source: str  # one line for people: where the samples came from
    # Samples in sizes of their own: their sides are multiples of this, `shape` is the square they are as large as, and a batch has "size" [B, A] beside
    # what is padded. 0 = every sample has `shape`.
    unit: int = 0


@runtime_checkable
class Tokenizer(Protocol):
    """Images, video or shapes <-> latents and ids."""

    channels: int  # of z
    stride: int  # pixels per token along each axis
    num_levels: int  # Q; 0 = continuous
    codebook_size: int  # S; 0 = continuous

    def encode(self, x: Tensor) -> Encoded: ...
    def decode(self, z: Tensor) -> Tensor: ...
    def codes(self, ids: Tensor) -> Tensor: ...  # [B, Q, *grid] -> z [B, C, *grid]


class TokenMixer(Protocol):
    """Moves information between tokens: [B, N, D] -> [B, N, D]. Made by mixer(dim=..., layer=...).

    It is the branch alone: norms before it, the residual and the modulation belong to the block. What is at padding (layout.valid False)
    reaches no other token, or the mixer refuses padding with a UsageError; what comes out at padding has no meaning.

    A causal mixer called with a cache takes x as the n tokens that follow those it was called with before (layout.coords are theirs) and keeps
    its state under cache[layer]; a cache may say under "num_tokens" for how many tokens to make room. The gradient does not flow through a cache.
    Other mixers compute all tokens at every call and leave a cache untouched.
    """

    is_causal: bool  # token n sees tokens 0 .. n alone
    needs_grid: bool  # works on a full dense grid (layout.grid) alone, and refuses padding unless it says otherwise
    is_resolution_free: bool  # no parameter belongs to a place: works on a grid it was not trained on

    def forward(self, x: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor: ...


class Backbone(Protocol):
    """Tensors to tensors: noisy latents -> latents, or ids (mask id = S) -> logits.

    `answers` says what an objective may ask it for, the word that the objective has under `asks`.
    """

    answers: str

    def forward(
        self, x: Tensor, t: Tensor | None, cond: Cond, layout: Layout, cache: Cache | None = None
    ) -> Tensor: ...


class Condition(Protocol):
    """What a generator is told of a sample besides what it draws: read from a batch while training, from a request while sampling.

    `takes` are the options of a backbone that follow from it: num_classes, context_dim, text_length, picture_size, picture_cells. `prepare(count)`, where there is
    one, comes before training on so many samples; `chosen(labels, rng)` and `read(picture)` are of one that is told pictures, for sheets that show them.
    """

    takes: Mapping[str, int]

    def of_batch(self, batch: Mapping[str, Any]) -> Cond: ...
    def of_request(
        self,
        labels: Tensor,
        rng: Rng,
        *,
        texts: Sequence[str] | None = None,
        database: Any = None,
        images: Sequence[Any] | None = None,
    ) -> Cond: ...
    def names(self, database: Any = None) -> tuple[str, ...]: ...  # of what labels of a request mean
    def classes(
        self, database: Any = None
    ) -> list[int]: ...  # labels that a request can be answered for, in turn where it names none


class Objective(Protocol):
    """Model and data -> losses; model -> what a sampler may call.

    `target` says what of a batch it learns, and so what __call__ receives: "ids" or "z" made by a tokenizer, or "x", the data themselves, when
    a tokenizer is what is trained. Losses whose names begin with "_" are logged and not summed. `draws` says what its predictor is where the target does
    not: "next" a PredictNext, "tokens" a PredictTokens. `asks` is what it wants of a backbone, in words that messages say.
    """

    target: str
    asks: str

    def __call__(
        self, model: Any, target: Tensor, cond: Cond, layout: Layout | None, rng: Rng
    ) -> dict[str, Tensor]: ...
    def predictor(
        self, model: Any, cond: Cond, layout: Layout
    ) -> Predict | PredictIds | PredictNext | PredictTokens | PredictMixture | PredictTree: ...


class Reuse(Protocol):
    """What is carried from step to step of a sampler, and when it is refreshed: sampler.reuse in a recipe.

    `target` says whose samplers it serves, as an objective's. Of latents ("z"), `start(model)` returns the model as one sampling run calls it, with a cache
    of its own; halves of a guided batch are rows like others. A kind that serves ids is handed to the sampler's constructor instead, as `reuse`.
    start raises UsageError for a backbone it cannot serve.
    """

    target: str


class Sampler(Protocol):
    """Start state + what it may call -> a finished state. `rng` holds one stream per sample: sample 17 is the same in any batch."""

    def __call__(self, predict: Any, start: Tensor, rng: Rng, on_step: OnStep | None = None) -> Tensor: ...


class Dataset(Protocol):
    """Samples by number. `x` [C, Y, X] float in [-1, 1], `label` int (-1 = none), `key` a name a person can find it by."""

    info: DataInfo

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


class Metric(Protocol):
    """Fed batches, asked once. Its state is a flat dict of tensors that may be summed over processes."""

    def update(self, **batch: Any) -> None: ...
    def state(self) -> dict[str, Tensor]: ...
    def result(self) -> dict[str, float]: ...
