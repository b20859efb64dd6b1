"""The step of a Llama-like block: the compiled path against the reference, the reference against the modules, and generation by both."""

import pytest
import torch
from torch import Tensor

from genkit import native
from genkit.backbones.gpt import GPT
from genkit.errors import UsageError
from genkit.kernels.decode_block.op import _decode_block, compiled, decode_block
from genkit.nn.layout import dense_layout
from genkit.objectives.next_token import NextToken
from genkit.rng import Rng
from genkit.samplers.autoregressive import Autoregressive

HAS_CPU = _decode_block.table().get("cpu") == "ready"
needs_library = pytest.mark.skipif(not HAS_CPU, reason="the library was not built")


def arguments(B: int, D: int, H: int, G: int, K: int, F: int, room: int, length: int) -> list:
    """Keys and values behind `length` are NaN: nothing may be read there."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    keys, values, angle = draw(B, G, room, K), draw(B, G, room, K), draw(K // 2)
    keys[:, :, length:] = values[:, :, length:] = torch.nan
    weights = [draw(D), draw((H + 2 * G) * K, D) / D**0.5, draw(D, H * K) / D**0.5]
    weights += [draw(D), draw(2 * F, D) / D**0.5, draw(D, F) / F**0.5]
    return [draw(B, D), *weights, angle.cos(), angle.sin(), keys, values, length, 1e-5]


SIZES = [
    (1, 64, 4, 4, 16, 96, 20, 7),
    (16, 64, 4, 4, 16, 96, 20, 19),
    (3, 20, 2, 1, 10, 13, 9, 0),
    (5, 36, 4, 2, 6, 7, 30, 22),
    (6, 150, 2, 2, 70, 33, 40, 39),
    (32, 24, 3, 3, 8, 9, 3, 1),
]


@needs_library
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("sizes", SIZES)
def test_compiled_step_equals_the_reference(sizes, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours, theirs = arguments(*sizes), [x.double() if isinstance(x, Tensor) else x for x in arguments(*sizes)]
        out, expected = decode_block(*ours, path="cpu"), decode_block(*theirs, path="reference")
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    for cache, right in zip(ours[9:11], theirs[9:11], strict=True):
        torch.testing.assert_close(cache.double(), right, atol=1e-5, rtol=1e-5, equal_nan=True)


@needs_library
@pytest.mark.parametrize("sizes", SIZES)
def test_padding_in_front_is_not_seen(sizes):
    *ours, length, eps = arguments(*sizes)
    first = torch.arange(sizes[0]) % (length + 1)
    for b, n in enumerate(first.tolist()):
        ours[9][b, :, :n] = ours[10][b, :, :n] = 1e3  # finite, as a mask multiplies nothing away
    theirs = [x.double() for x in ours]
    out = decode_block(*ours, length, eps, first, path="cpu")
    expected = decode_block(*theirs, length, eps, first, path="reference")
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    alone = [x[-1:, :, int(first[-1]) :].contiguous() for x in theirs[9:11]]
    last = decode_block(theirs[0][-1:], *theirs[1:9], *alone, length - int(first[-1]), eps, path="reference")
    torch.testing.assert_close(expected[-1:], last)


@needs_library
@pytest.mark.parametrize("name", native.SETS)
def test_every_instruction_set_gives_the_same(name, monkeypatch):
    if native.SETS.index(name) > native.SETS.index(native.instruction_set()):
        pytest.skip("this processor does not have it")
    monkeypatch.setenv("GENKIT_CPU_SET", name)
    native.library.cache_clear()
    native.function.cache_clear()
    try:
        for sizes in SIZES[:4]:
            expected = decode_block(*arguments(*sizes), path="reference")
            torch.testing.assert_close(decode_block(*arguments(*sizes), path="cpu"), expected, atol=1e-5, rtol=1e-5)
    finally:
        native.library.cache_clear()
        native.function.cache_clear()


@needs_library
def test_compiled_step_refuses_what_it_cannot_do():
    wide = [x.double() if isinstance(x, Tensor) else x for x in arguments(*SIZES[0])]
    with pytest.raises(UsageError, match="computes in float32"):
        decode_block(*wide, path="cpu")
    with pytest.raises(UsageError, match="up to 32 samples"):
        decode_block(*arguments(33, 8, 2, 2, 4, 8, 3, 1), path="cpu")
    assert compiled(torch.zeros(33, 8)) is None


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (1, torch.zeros(3), "norm1 is"),
        (5, torch.zeros(5, 64), "wup is"),
        (7, torch.zeros(3), "cos is"),
        (10, torch.zeros(1, 4, 21, 16), "values is"),
        (11, 20, r"length=20 must be in 0..19"),
        (13, torch.tensor([8]), r"first is in 8..8, expected 0..7"),
        (13, torch.tensor([0.0]), r"first is torch.float32 \[1\], expected int64 \[1\]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(index, value, message):
    wrong = [*arguments(*SIZES[0]), None]
    wrong[index] = value
    with pytest.raises(ValueError, match=message):
        decode_block(*wrong)


@torch.no_grad()
@pytest.mark.parametrize("num_kv_heads", [None, 1])
def test_generation_by_the_kernel_equals_that_by_the_modules(num_kv_heads, monkeypatch):
    torch.manual_seed(0)
    mixer = {
        "type": "attention",
        "num_heads": 4,
        "num_kv_heads": num_kv_heads,
        "qk_norm": False,
        "bias": False,
        "is_causal": True,
    }
    model = GPT(codebook_size=30, num_levels=1, num_classes=4, grid=(4, 4), dim=32, depth=2, mixer=mixer, multiple_of=8)
    for parameter in model.eval().parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    predict = NextToken().predictor(model, {"label": torch.tensor([0, 1, -1])}, dense_layout((4, 4)))
    ids = Rng.at(0, 0, 3).integers(30, 16)
    steps: dict[str, list[Tensor]] = {}
    for path in ("cpu", "reference") if HAS_CPU else ("reference",):
        monkeypatch.setenv("GENKIT_KERNEL", f"decode_block={path}")
        cache: dict = {}
        steps[path] = [predict(ids[:, :n], cache) for n in range(16)]
    uncached = torch.cat([predict(ids[:, :n]) for n in range(16)], dim=1)
    for found in steps.values():
        torch.testing.assert_close(torch.cat(found, dim=1), uncached, atol=1e-5, rtol=1e-5)
    sampled = Autoregressive()(predict, torch.full((3, 1, 4, 4), -1), Rng.at(1, 0, 3))
    assert len(sampled.unique()) > 5
