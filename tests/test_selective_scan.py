from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from genkit import native
from genkit.errors import UsageError
from genkit.kernels.selective_scan.op import selective_scan
from tests.parity import assert_agrees, gradients

PATHS = ["cpu", "torch"]


def some(
    B: int, N: int, D: int, R: int, groups: int | None = None, plain: bool = False, scale: float = 0.5
) -> dict[str, Tensor | None]:
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    maps = (B, N, R) if groups is None else (B, N, groups, R)
    return {
        "u": normal(B, N, D),
        "delta": normal(B, N, D) * scale,
        "A": -4 * torch.rand(D, R, generator=random),
        "B": normal(*maps),
        "C": normal(*maps),
        "D_skip": None if plain else normal(D),
        "z": None if plain else normal(B, N, D),
        "delta_bias": None if plain else normal(D),
        "initial_state": normal(B, D, R),
    }


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1), (2, 63, 100, 16), (1, 130, 64, 5), (3, 7, 130, 9, 2), (1, 33, 12, 17, 3, True), (1, 5, 3, 256)],
)
def test_every_path_equals_the_reference(path, reverse, shape):
    assert_agrees(selective_scan, path, some(*shape), delta_softplus=True, reverse=reverse, return_state=True)


@pytest.mark.parametrize("path", PATHS)
def test_steps_without_softplus(path):
    x = some(2, 40, 20, 4, plain=True)
    x["delta"] = x["delta"].abs()
    assert_agrees(selective_scan, path, x)


@pytest.mark.parametrize("path", PATHS)
def test_lengths_around_a_stretch(path):
    assert_agrees(selective_scan, path, some(1, 300, 5, 3), delta_softplus=True, return_state=True)


@pytest.mark.parametrize("instructions", native.SETS[:-1])
def test_lesser_instruction_sets(instructions):
    """The comparisons above and those of the convolution, in a process of their own because a library is chosen once."""
    if native.SETS.index(instructions) > native.SETS.index(native.instruction_set()):
        pytest.skip(f"this processor has no {instructions}")
    files = [__file__, str(Path(__file__).with_name("test_causal_conv1d.py"))]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *files, "-k", "every_path_equals and cpu"]
    done = subprocess.run(command, env={**os.environ, "GENKIT_CPU_SET": instructions}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("shape", [(1, 1, 2, 1), (1, 19, 6, 3, 2), (2, 18, 3, 4, None, True)])
@pytest.mark.parametrize("reverse", [False, True])
def test_triton_equals_the_reference(shape, reverse):
    pytest.importorskip("triton")
    assert_agrees(selective_scan, "triton", some(*shape), delta_softplus=True, reverse=reverse, return_state=True)


def test_triton_reads_half_precision():
    pytest.importorskip("triton")
    x = some(1, 5, 4, 3)
    half = {k: v.bfloat16() if k in ("u", "delta", "B", "C", "z") else v for k, v in x.items()}
    device = os.environ["GENKIT_TEST_DEVICE"]
    got = selective_scan(**{k: v.to(device) for k, v in half.items()}, delta_softplus=True, path="triton")
    assert got.dtype == torch.bfloat16
    expected = selective_scan(**half, delta_softplus=True, path="reference")
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-2, atol=1e-2)


def test_the_reference_by_hand():
    """Two tokens, one channel, one state."""
    ones = torch.ones(1, 2, 1, dtype=torch.float64)
    u, delta = 3 * ones, 0.5 * ones
    A, D_skip = torch.tensor([[-2.0]], dtype=torch.float64), torch.tensor([10.0], dtype=torch.float64)
    B, C, z = ones.clone(), torch.tensor([[[1.0], [2.0]]], dtype=torch.float64), ones.clone()
    e, gate = torch.tensor(-1.0, dtype=torch.float64).exp(), 1 / (1 + torch.tensor(-1.0, dtype=torch.float64).exp())
    h1 = e * 4 + 0.5 * 3
    h2 = e * h1 + 1.5
    y, state = selective_scan(
        u, delta, A, B, C, D_skip, z, initial_state=torch.full((1, 1, 1), 4.0, dtype=torch.float64), return_state=True
    )
    torch.testing.assert_close(y.flatten(), torch.stack([(h1 + 30) * gate, (2 * h2 + 30) * gate]))
    torch.testing.assert_close(state.flatten(), h2[None])


@pytest.mark.parametrize("path", [*PATHS, "reference"])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_state_can_be_handed_on(path, reverse):
    x = some(2, 75, 33, 8)
    tokens = ("u", "delta", "B", "C", "z")

    def part(a: int, b: int, state: Tensor | None) -> tuple[Tensor, Tensor]:
        own = {k: v[:, a:b] if k in tokens else v for k, v in x.items()} | {"initial_state": state}
        return selective_scan(**own, delta_softplus=True, reverse=reverse, return_state=True, path=path)

    whole, last = part(0, 75, x["initial_state"])
    order = [(40, 75), (0, 40)] if reverse else [(0, 40), (40, 75)]
    first, state = part(*order[0], x["initial_state"])
    second, state = part(*order[1], state)
    joined = torch.cat([second, first] if reverse else [first, second], 1)
    torch.testing.assert_close(joined, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_reverse_is_the_scan_of_the_flipped_sequence(path):
    x = some(1, 45, 20, 6)
    flipped = {k: v.flip(1) if k in ("u", "delta", "B", "C", "z") else v for k, v in x.items()}
    expected = selective_scan(**flipped, delta_softplus=True, path=path).flip(1)
    assert torch.equal(selective_scan(**x, delta_softplus=True, reverse=True, path=path), expected)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("scale", [1e3, 1e-6])
def test_strong_and_weak_decay(path, scale):
    """A state that forgets all at once, exp(-4000), and one that forgets nothing."""
    x = some(1, 70, 17, 4, plain=True)
    x["delta"] = x["delta"].abs() * scale
    assert_agrees(selective_scan, path, x, return_state=True)


def test_growing_states():
    """Rates above 0 are unusual, not wrong."""
    x = some(1, 40, 17, 4, plain=True)
    x["delta"], x["A"] = x["delta"].abs(), x["A"].abs()
    assert_agrees(selective_scan, "cpu", x, rtol=1e-4)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C", "z", "initial_state"])
def test_nan_comes_out_where_the_reference_has_it(path, name):
    x = some(1, 40, 18, 3)
    x[name].view(-1)[x[name].numel() // 2] = float("nan")
    got = selective_scan(**x, delta_softplus=True, return_state=True, path=path)
    expected = selective_scan(**x, delta_softplus=True, return_state=True, path="reference")
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a.isnan(), b.isnan())
    assert expected[0].isnan().any()


@pytest.mark.parametrize("path", PATHS)
def test_infinite_steps_forget_everything(path):
    x = some(1, 40, 18, 3)
    x["delta"][0, 20, 5] = float("inf")
    x["u"][0, 20, 5] = 0.0
    x["A"] -= 0.1
    got = selective_scan(**x, delta_softplus=True, path=path)
    expected = selective_scan(**x, delta_softplus=True, path="reference")
    assert torch.equal(got.isnan(), expected.isnan())


def test_the_softplus_keeps_small_steps():
    """dt of 1e-6 has as many digits as one of 1."""
    x = some(1, 3, 40, 2, plain=True)
    x["delta"] = torch.linspace(-80, 60, 120).reshape(1, 3, 40)
    x["A"], x["initial_state"] = torch.zeros(40, 2), torch.zeros(1, 40, 2)
    x["B"] = x["C"] = torch.zeros(1, 3, 2).index_fill_(2, torch.tensor([0]), 1.0)
    x["u"] = torch.zeros(1, 3, 40).index_fill_(1, torch.tensor([2]), 1.0)
    expected = torch.nn.functional.softplus(x["delta"][:, 2].double())
    got = selective_scan(**x, delta_softplus=True, path="cpu")[:, 2]
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0)


def test_half_precision_is_computed_in_single():
    x = some(1, 60, 33, 4)
    half = {k: v.bfloat16() if k in ("u", "delta", "B", "C", "z") else v for k, v in x.items()}
    wide = {k: v.float() for k, v in half.items()}
    for path in PATHS:
        y, state = selective_scan(**half, delta_softplus=True, return_state=True, path=path)
        expected, last = selective_scan(**wide, delta_softplus=True, return_state=True, path=path)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, expected.bfloat16())
        assert torch.equal(state, last)
        assert gradients(lambda **k: selective_scan(**k, path=path), half)["du"].dtype == torch.bfloat16  # noqa: B023


def test_layout_in_memory_does_not_matter():
    x = some(2, 30, 24, 4)
    strided = {k: v.transpose(0, -1).contiguous().transpose(0, -1) for k, v in x.items()}
    assert not strided["u"].is_contiguous()
    for path in PATHS:
        expected = gradients(lambda **k: selective_scan(**k, delta_softplus=True, path=path), x)  # noqa: B023
        got = gradients(lambda **k: selective_scan(**k, delta_softplus=True, path=path), strided)  # noqa: B023
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-5)


def test_the_same_gradients_for_any_number_of_threads():
    x = some(2, 64, 150, 4)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = gradients(lambda **k: selective_scan(**k, delta_softplus=True, path="cpu"), x)
        torch.set_num_threads(3)
        together = gradients(lambda **k: selective_scan(**k, delta_softplus=True, path="cpu"), x)
    finally:
        torch.set_num_threads(threads)
    for name in ("out0", "du", "ddelta", "dz"):
        assert torch.equal(alone[name], together[name]), name


def test_only_the_state_needs_a_gradient():
    x = some(1, 10, 6, 3)
    for path in PATHS:
        h = x["initial_state"].clone().requires_grad_()
        _, last = selective_scan(**{**x, "initial_state": h}, delta_softplus=True, return_state=True, path=path)
        last.sum().backward()
        decay = (torch.nn.functional.softplus(x["delta"] + x["delta_bias"]).sum(1)[..., None] * x["A"]).exp()
        torch.testing.assert_close(h.grad, decay, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("path", PATHS)
def test_groups_of_their_own_and_maps_that_are_the_same_for_all_tokens(path):
    """As with every channel's B and C written out."""
    x = some(2, 9, 12, 3)
    random = torch.Generator().manual_seed(1)
    shapes = {"constant": (12, 3), "two": (2, 9, 2, 3), "three": (2, 9, 3, 3), "one": (2, 9, 3)}
    maps = {word: torch.randn(shape, generator=random) for word, shape in shapes.items()}

    def written_out(given: Tensor) -> Tensor:
        if given.ndim == 2:
            return given.expand(2, 9, 12, 3).contiguous()
        given = given if given.ndim == 4 else given[:, :, None]
        return given.repeat_interleave(12 // given.shape[2], 2)

    for B, C in (("constant", "one"), ("two", "constant"), ("constant", "constant"), ("two", "three"), ("one", "two")):
        found = selective_scan(**x | {"B": maps[B], "C": maps[C]}, delta_softplus=True, path=path)
        expected = x | {"B": written_out(maps[B]), "C": written_out(maps[C])}
        torch.testing.assert_close(found, selective_scan(**expected, delta_softplus=True, path="reference"))
    leaf = maps["constant"].requires_grad_()
    selective_scan(**x | {"B": leaf}, delta_softplus=True, path=path).sum().backward()
    wide = written_out(leaf.detach()).requires_grad_()
    selective_scan(**x | {"B": wide}, delta_softplus=True, path="reference").sum().backward()
    torch.testing.assert_close(leaf.grad, wide.grad.sum((0, 1)), rtol=1e-5, atol=1e-5)


BAD = {
    "u": (lambda x: x["u"][0], r"u must be \[B, N, D\]"),
    "delta": (lambda x: x["delta"][:, :3], r"delta must be \[2, 5, 4\] to go with u, got \[2, 3, 4\]"),
    "A": (lambda x: x["A"][:3], r"A must be \[4, R\] to go with u, with R of 1 to 256, got \[3, 3\]"),
    "B": (
        lambda x: x["B"][..., :2],
        r"B must be \[2, 5, 3\], \[2, 5, G, 3\] or \[4, 3\] to go with u and A, got \[2, 5, 2\]",
    ),
    "C": (lambda x: x["C"].double(), "C must be torch.float32 beside u of torch.float32, got torch.float64"),
    "D_skip": (lambda x: x["D_skip"][None], r"D_skip must be \[4\] to go with u, got \[1, 4\]"),
    "z": (lambda x: x["z"].to("meta"), "z is on meta, u on cpu"),
    "delta_bias": (lambda x: x["delta_bias"].half(), "delta_bias must be torch.float32 beside u"),
    "initial_state": (lambda x: x["initial_state"][:1], r"initial_state must be \[2, 4, 3\] to go with u"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_named(name):
    x = some(2, 5, 4, 3)
    make, message = BAD[name]
    with pytest.raises(ValueError, match=f"selective_scan: {message}"):
        selective_scan(**{**x, name: make(x)})


def test_groups_that_do_not_divide_are_named():
    x = some(2, 5, 4, 3)
    with pytest.raises(ValueError, match="B has 3 groups; they must divide the 4 channels"):
        selective_scan(**{**x, "B": torch.zeros(2, 5, 3, 3)})
    with pytest.raises(UsageError, match="selective_scan: the path cpu cannot run: it computes in float32"):
        selective_scan(**{k: v.double() for k, v in x.items()}, path="cpu")


@pytest.mark.parametrize("plain", [False, True])
def test_opcheck(plain):
    from genkit.kernels.selective_scan import cpu

    x = some(1, 37, 20, 3, groups=2, plain=plain)
    leaves = [v.requires_grad_() if v is not None else None for v in x.values()]
    torch.library.opcheck(cpu._forward, (*leaves, True, False, True))
    kept = cpu._forward(*x.values(), True, False, True)[2].detach()
    inputs = [v.detach() if v is not None else None for v in leaves]
    torch.library.opcheck(cpu._backward, (*inputs, kept, inputs[0], inputs[-1], True, False))


def test_opcheck_of_triton():
    pytest.importorskip("triton")
    from genkit.kernels.selective_scan import triton

    x = some(1, 5, 4, 2, groups=1)
    leaves = [v.requires_grad_() if v is not None else None for v in x.values()]
    torch.library.opcheck(triton._forward, (*leaves, True, False, True))
    kept = triton._forward(*x.values(), True, False, True)[2].detach()
    inputs = [v.detach() if v is not None else None for v in leaves]
    torch.library.opcheck(triton._backward, (*inputs, kept, inputs[0], inputs[-1], True, False))


def test_compiled_equals_eager():
    x = some(1, 37, 20, 3)

    def run(**k: Tensor) -> tuple[Tensor, ...]:
        return selective_scan(**k, delta_softplus=True, return_state=True, path="cpu")

    expected = gradients(run, x)
    got = gradients(torch.compile(run, backend="aot_eager", fullgraph=True), x)
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("path", PATHS)
def test_what_is_kept_for_the_backward_pass(path):
    """Much less than the [B, N, D, R] states that must not exist: inputs, and of cpu the state before every 32 steps."""
    x = some(1, 1024, 32, 16)
    kept: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        selective_scan(**{k: v.requires_grad_() for k, v in x.items()}, delta_softplus=True, path=path)
    assert 0 < sum(kept.values()) < 0.75 * 4 * 1024 * 32 * 16


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak where Linux keeps it")
def test_the_compiled_path_never_holds_all_states():
    """Peak of a forward and a backward pass, in a process of its own."""
    script = (
        "from pathlib import Path\n"
        "import torch\n"
        "from genkit.kernels.selective_scan.op import selective_scan\n"
        "D, R = 128, 64\n"
        "f = lambda *s: torch.randn(*s).requires_grad_()\n"
        "def run(N):\n"
        "    u, delta, A = f(1, N, D), f(1, N, D), (-torch.rand(D, R)).requires_grad_()\n"
        "    selective_scan(u, delta, A, f(1, N, R), f(1, N, R), delta_softplus=True, path='cpu').sum().backward()\n"
        "def peak():\n"
        "    lines = Path('/proc/self/status').read_text().splitlines()\n"
        "    return next(int(line.split()[1]) for line in lines if line.startswith('VmHWM:')) * 1024\n"
        "run(64)\n"
        "Path('/proc/self/clear_refs').write_text('5')\n"
        "before = peak()\n"
        "run(2048)\n"
        "print((peak() - before) / (4 * 2048 * D * R))\n"
    )
    folder = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": folder},
    )
    assert 0 < float(done.stdout) < 0.5
