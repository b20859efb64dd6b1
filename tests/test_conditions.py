"""What generators are told: captions and neighbours, from the recipe to the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from genkit import config, train
from genkit.backbones.dit import DiT
from genkit.backbones.masked import Masked
from genkit.cli import main
from genkit.conditions.captions import Captions, Encoder
from genkit.conditions.embeddings import Database, Embedding, embedding
from genkit.conditions.label import Label
from genkit.conditions.neighbours import FILE, Neighbours
from genkit.data.fashion import Fashion
from genkit.errors import GenkitError, UsageError
from genkit.guidance import Guidance, guide
from genkit.job import told
from genkit.metrics import sources
from genkit.nn.context import Context
from genkit.nn.layout import dense_layout
from genkit.nn.text import bytes_of
from genkit.nn.told import Told
from genkit.objectives.edm import Edm
from genkit.objectives.flow import Flow
from genkit.objectives.masked import Masked as MaskedObjective
from genkit.optional import is_installed
from genkit.pipeline import open_run
from genkit.reuse.skip_blocks import SkipBlocks
from genkit.rng import Rng
from tests.mistakes import told_error
from tests.text_encoders import save_encoder
from tests.tiny import GENERATOR, TOKENIZER

SHORT = {"train.num_samples": 32}
GPT = {
    "backbone": {"type": "gpt", "dim": 16, "depth": 1, "multiple_of": 8},
    "objective": {"type": "next_token"},
    "sampler": {"type": "autoregressive", "guidance": 2.0},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Runs of a few steps: told captions, neighbours, labels. What they draw hangs on what they are told, as their heads are not left at 0."""
    folder = tmp_path_factory.mktemp("conditions")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(TOKENIZER, SHORT)
        train(GENERATOR | {"name": "label"}, SHORT)
        train(GENERATOR | {"name": "captions", "condition": {"type": "captions", "length": 12}}, SHORT)
        train(GENERATOR | GPT | {"name": "neighbours", "condition": {"type": "neighbours", "k": 3}}, SHORT)
    return folder


@pytest.fixture
def here(runs, monkeypatch):
    monkeypatch.chdir(runs)
    return runs


def lively(run: str) -> Any:
    """The pipeline of a run whose network listens: a few steps have not taught it to."""
    pipe = open_run(f"runs/{run}")
    torch.manual_seed(1)
    for parameter in pipe.backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return pipe


# Databases


def test_neighbours_are_those_of_brute_force_without_the_query_itself():
    generator = torch.Generator().manual_seed(0)
    vectors, queries = torch.randn(50, 6, generator=generator), torch.randn(7, 6, generator=generator)
    database = Database(vectors, torch.arange(50) % 5)
    similarity = torch.nn.functional.cosine_similarity(queries[:, None], vectors[None], dim=-1)
    assert torch.equal(database.search(queries, 4), similarity.topk(4).indices)
    itself = torch.arange(50)
    found = database.search(vectors, 3, omit=itself)
    assert (found != itself[:, None]).all()
    assert torch.equal(found, database.search(vectors, 4)[:, 1:])
    assert set((database.of_classes([1, 3]).labels).tolist()) == {1, 3}
    if is_installed("faiss"):
        assert torch.equal(Database(vectors, index="faiss").search(queries, 4), similarity.topk(4).indices)


def test_queries_are_drawn_by_class_and_by_how_often_they_are_neighbours():
    database = Database(torch.randn(60, 3, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 3)
    labels = torch.tensor([0, 1, 2, -1] * 10)
    rows = database.draw(Rng.at(0, 0, 40), labels)
    assert torch.equal(rows[labels >= 0] % 3, labels[labels >= 0])
    parts = [database.draw(Rng.at(0, i, 1), labels[i : i + 1]) for i in range(40)]
    assert torch.equal(torch.cat(parts), rows), "a draw depends on its own stream alone"
    often = database.search(database.vectors, 2, torch.arange(60)).flatten().bincount(minlength=60)
    chosen = database.draw(Rng.at(1, 0, 200), torch.full((200,), -1), share=0.1, k=2).unique()
    assert len(chosen) <= 6
    assert often[chosen].min() >= often.sort(descending=True).values[5]


def test_a_database_is_written_and_read(tmp_path):
    database = Database(torch.randn(5, 3), torch.arange(5), ("a", "b"), "x 1")
    database.save(tmp_path / "d.safetensors")
    again = Database.load(tmp_path / "d.safetensors")
    assert torch.equal(again.vectors, database.vectors)
    assert torch.equal(again.labels, database.labels)
    assert (again.class_names, again.made_by) == (("a", "b"), "x 1")
    (tmp_path / "e.safetensors").write_bytes(b"nothing")
    with pytest.raises(GenkitError, match="is no database of neighbours"):
        Database.load(tmp_path / "e.safetensors")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Database(torch.zeros(0, 6)), "the database of neighbours is empty"),
        (lambda: Database(torch.ones(3, 6)).search(torch.ones(2, 6), 4), "4 neighbours of a database of 3 entries"),
        (lambda: Database(torch.ones(3, 6)).search(torch.ones(2, 6), 3, torch.tensor([0, 1])), "between 1 and 2"),
        (lambda: Database(torch.ones(3, 6)).search(torch.ones(2, 6), 0), "0 neighbours"),
        (lambda: Database(torch.ones(3, 6)).search(torch.ones(2, 5), 1), "both must come from one embedding"),
        (lambda: Database(torch.ones(3, 6)).of_classes([1]), "no classes to choose by"),
        (lambda: Database(torch.ones(3, 6)).draw(Rng.at(0, 0, 1), torch.tensor([1])), "no classes to choose by"),
        (lambda: Database(torch.ones(3, 6), torch.tensor([0, 1, 1])).of_classes([7]), "is empty"),
        (
            lambda: Database(torch.ones(2, 6), torch.tensor([0, 1]), ("cat", "dog", "bird")).draw(
                Rng.at(0, 0, 1), torch.tensor([2])
            ),
            "no entry of class bird; it has cat, dog",
        ),
        (lambda: Neighbours(k=0), "condition.k=0"),
        (lambda: Neighbours(share=0.0), "condition.share=0.0"),
        (lambda: embedding("clip", tokenizer=None, grid=(7, 7), cells=2), "condition.embedding=clip: known: clip-vit"),
        (lambda: Captions(length=0), "condition.length=0"),
        (lambda: Captions(files=True), "data.type=folder has alone"),
        (lambda: Captions(encoder="no/such/folder"), "is no text encoder that transformers can open"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()


# Captions


def test_captions_are_the_names_of_emoji_or_of_classes():
    said = Captions(length=16, class_names=("faces", "coat"))
    batch = {"key": ["1F600 grinning face", "train/17", "x"], "label": torch.tensor([0, 1, -1])}
    text = said.of_batch(batch)["text"]
    assert [bytes(row[row > 0].tolist()).decode() for row in text] == ["grinning face", "coat", ""]


def test_captions_of_a_folder_lie_beside_its_images(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.txt").write_text("a red hat\n")
    said = Captions(files=True, data={"type": "folder", "path": str(tmp_path)}, class_names=("a",))
    assert said.caption("a/1.jpg", 0) == "a red hat"
    with pytest.raises(UsageError, match="needs a text file beside every image"):
        said.caption("a/2.jpg", 0)


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_a_text_encoder_of_transformers_is_attended_to(tmp_path, kind, capfd):
    model = save_encoder(tmp_path, kind)
    capfd.readouterr()
    said = Captions(encoder=str(tmp_path), length=6, class_names=("red hat", "hat"))
    assert not any(capfd.readouterr()), "opening it says nothing"
    assert said.takes == {"num_classes": 0, "context_dim": 8}
    labels = torch.tensor([0, 1, -1])
    cond = said.of_request(labels, Rng.at(0, 0, 3))
    context = cond["context"]
    assert cond["said"].sum(1).tolist() == [4, 3, 0]
    given = said.encoder.tokenizer(["red hat"], return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(context[0, :4], _states(model, given)[0], atol=1e-5, rtol=1e-5)
    assert (context[0, 4:] == 0).all()
    assert (context[2] == 0).all(), "no caption is nothing"
    encoder = Encoder(str(tmp_path), 6)
    torch.testing.assert_close(encoder(["hat", "red hat"])[1], context[0], atol=1e-6, rtol=0)


def test_a_missing_transformers_names_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(GenkitError, match=r"transformers is not installed; pip install 'genkit-torch\[encoders\]'"):
        Captions(encoder="google/flan-t5-xl")


def _states(model, given):
    return model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).last_hidden_state


# Recipes


def test_the_backbone_follows_from_the_condition():
    recipe = config.check(GENERATOR | {"name": "x", "condition": {"type": "captions", "length": 5}})
    assert told(recipe, {"num_classes": 0, "text_length": 5})["text_length"] == 5
    recipe["backbone"]["text_length"] = 7
    with pytest.raises(UsageError, match=r"backbone\.text_length=7, but condition\.type=captions gives 5"):
        told(recipe, {"text_length": 5})
    recipe["backbone"] = {"type": "bert"}
    with pytest.raises(UsageError, match=r"needs a backbone with text_length, and bert has none; .*gpt, masked"):
        told(recipe, {"text_length": 5})
    with pytest.raises(UsageError, match="a tokenizer is told nothing"):
        config.check(TOKENIZER | {"condition": {"type": "label"}})


def test_what_is_asked_must_be_what_it_was_trained_on():
    labels, rng = torch.tensor([0]), Rng.at(0, 0, 1)
    with pytest.raises(UsageError, match="trained on classes alone"):
        Label().of_request(labels, rng, texts=["x"])
    with pytest.raises(UsageError, match="trained on classes alone"):
        Label().of_request(labels, rng, database=1)
    with pytest.raises(UsageError, match="trained on captions"):
        Captions().of_request(labels, rng, database=1)
    with pytest.raises(UsageError, match="trained on neighbours"):
        Neighbours().of_request(labels, rng, texts=["x"])


# Whole lines


def test_captions_from_the_command_line(here, capsys):
    assert main(["sample", "runs/captions", "--caption", "a bag", "--caption", "a coat", "-n", "3", "-q"]) == 0
    rows = json.loads((here / "runs/captions/samples/seed-0-captions/samples.json").read_text())["samples"]
    assert [row["caption"] for row in rows] == ["a bag", "a coat", "a bag"]
    error = told_error(capsys, "sample", "runs/label", "--caption", "a bag", "-q", "-o", "out/label")
    assert "trained on classes alone" in error
    error = told_error(capsys, "sample", "runs/captions", "--caption", "a bag", "--labels", "2", "-q")
    assert "--caption and --labels both say what to draw" in error
    pipe = lively("captions")
    labels = torch.tensor([7, 8, -1])
    names = [pipe.class_names[7], pipe.class_names[8], ""]
    by_label = pipe.generate(labels, [1, 2, 3])
    assert torch.equal(pipe.generate(torch.full((3,), -1), [1, 2, 3], texts=names), by_label)
    assert not torch.equal(pipe.generate(labels, [1, 2, 3], texts=["a dress"] * 3), by_label)
    with pytest.raises(UsageError, match="1 captions for 3 samples"):
        pipe.generate(labels, [1, 2, 3], texts=["a dress"])


def test_a_generator_is_told_neighbours_of_training_images_but_never_the_image_itself(here):
    run = open_run("runs/neighbours")
    assert run.backbone.config["context_dim"] == 32
    assert run.backbone.config["num_classes"] == 0
    database = Database.load(here / "runs/neighbours" / FILE)
    assert (len(database), database.class_names) == (9000, Fashion(source="embedded").info.class_names)
    images = sources.from_spec(TOKENIZER["data"], "train")
    x, _ = images.read(5, 8)
    torch.testing.assert_close(run.told.embed(x), database.vectors[5:8], atol=1e-5, rtol=1e-5)
    run.told.prepare(9000)
    context = run.told.of_batch({"index": torch.tensor([5, 6]), "label": torch.tensor([0, 0])})["context"]
    assert context.shape == (2, 3, 32)
    assert (context != database.vectors[5:7, None]).any(-1).all()
    with pytest.raises(UsageError, match="8999 images are trained on"):
        run.told.prepare(8999)


def test_a_database_is_swapped_after_training(here, capsys):
    pipe = lively("neighbours")
    labels, seeds = torch.tensor([8, 8, 1]), [1, 2, 3]
    own = pipe.generate(labels, seeds)
    torch.testing.assert_close(pipe.generate(labels[1:2], seeds[1:2]), own[1:2], atol=1e-4, rtol=0)  # in any batch
    bags = pipe.told.open("fashion:val").of_classes([8])
    assert not torch.equal(pipe.generate(labels[:2], seeds[:2], database=bags), own[:2])
    with pytest.raises(UsageError, match="no entry of class trouser; it has bag"):
        pipe.generate(labels, seeds, database=bags)
    # The same from the command line, by a folder, by a word and by a file of embeddings.
    for name in ("cat", "dog"):
        (here / "pets" / name).mkdir(parents=True, exist_ok=True)
        for i in range(3):
            pixels = np.random.default_rng(i).integers(0, 255, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(here / "pets" / name / f"{i}.png")
    assert main(["sample", "runs/neighbours", "--database", "pets", "-n", "4", "-q"]) == 0
    rows = json.loads((here / "runs/neighbours/samples/seed-0-pets/samples.json").read_text())["samples"]
    assert [row["class"] for row in rows] == ["cat", "dog", "cat", "dog"]
    assert main(["database", "runs/neighbours", "fashion:val", "--classes", "bag,coat", "-o", "two.safetensors"]) == 0
    assert main(["sample", "runs/neighbours", "--database", "two.safetensors", "--labels", "coat", "-q"]) == 0
    # Classes that the database has no entry of are not asked for.
    words = [
        "sample",
        "runs/neighbours",
        "--database",
        "fashion:val",
        "--classes",
        "bag,coat",
        "-n",
        "3",
        "-o",
        "two",
        "-q",
    ]
    assert main(words) == 0
    rows = json.loads((here / "two/samples.json").read_text())["samples"]
    assert [row["class"] for row in rows] == ["coat", "bag", "coat"]
    capsys.readouterr()


def test_databases_that_do_not_fit_are_one_error(here, capsys, tmp_path):
    sample = ("sample", "runs/neighbours", "-q", "-o", str(tmp_path / "out"), "--database")
    (tmp_path / "empty").mkdir()
    assert "empty" in told_error(capsys, *sample, str(tmp_path / "empty"))
    Database(torch.ones(5, 7), made_by="x").save(tmp_path / "wide.safetensors")
    error = told_error(capsys, *sample, str(tmp_path / "wide.safetensors"))
    assert "holds embeddings of 7 numbers, this generator is conditioned on 32" in error
    Database(torch.ones(5, 32), made_by="x").save(tmp_path / "other.safetensors")
    assert "was made by another embedding (x)" in told_error(capsys, *sample, str(tmp_path / "other.safetensors"))
    assert "the database of neighbours is empty" in told_error(
        capsys, *sample, str(empty_file(tmp_path / "none.safetensors"))
    )
    np.savez(tmp_path / "rgb.npz", arr_0=np.zeros((9, 32, 32, 3), np.uint8))
    assert "bring them to the same size and channels" in told_error(capsys, *sample, str(tmp_path / "rgb.npz"))
    assert "is neither a folder" in told_error(capsys, *sample, "fashin")
    assert "for generators that are told neighbours" in told_error(
        capsys, "sample", "runs/label", "--database", "fashion:val", "-q"
    )
    assert "3 neighbours of a database of 3 entries" in told_error(
        capsys, *sample, str(few(tmp_path / "few.safetensors")), "--labels", "-1"
    )


def empty_file(path: Path) -> Path:
    from safetensors.torch import save_file

    save_file({"vectors": torch.zeros(0, 32)}, path, {"made_by": open_run("runs/neighbours").told.embed.name})
    return path


def few(path: Path) -> Path:
    name = open_run("runs/neighbours").told.embed.name
    Database(torch.randn(3, 32), made_by=name).save(path)
    return path


def test_an_embedding_is_any_feature_net():
    found = embedding("fashion-cnn", tokenizer=None, grid=(7, 7), cells=2)
    assert found.name.startswith("fashion-cnn-v1 ")
    assert found(torch.zeros(2, 1, 28, 28)).shape == (2, found.dim) == (2, 128)
    assert Embedding("x", 3, lambda x: x.double())(torch.zeros(1, 3)).dtype == torch.float32


def test_generators_of_ids_refuse_continuous_latents_and_starts_that_do_not_fit(here):
    tokenizer = {"type": "kl", "stride": 4, "width": 8, "num_blocks": 0, "channels": 4}
    train(TOKENIZER | {"name": "kl", "tokenizer": tokenizer}, SHORT)
    with pytest.raises(UsageError, match=r"objective\.type=masked learns ids, and the tokenizer KL makes continuous"):
        train(GENERATOR | {"name": "ids", "tokenizer": {"from": "runs/kl"}}, SHORT)
    pipe = open_run("runs/label")
    start = torch.full((1, 1, 7, 7), -1)
    start[0, 0, 3, 3] = 16
    with pytest.raises(UsageError, match=r"start holds the id 16 of a codebook of 16 \(0-15\)"):
        pipe.generate(torch.tensor([1]), [0], start=start)
    with pytest.raises(UsageError, match=r"start has the shape \[1, 1, 7, 6\], expected \[1, 1, 7, 7\]"):
        pipe.generate(torch.tensor([1]), [0], start=start[..., :6])


# The masked generator


@torch.no_grad()
@pytest.mark.parametrize("name", ["context", "text"])
def test_a_masked_generator_listens_and_zeros_are_nothing(name):
    torch.manual_seed(0)
    options = {"context_dim": 5} if name == "context" else {"text_length": 12}
    attention = {"type": "attention", "num_heads": 2}
    model = Masked(
        codebook_size=7, num_levels=1, num_classes=0, grid=(4, 4), dim=16, depth=2, mixer=attention, **options
    )
    ids = torch.full((3, 1, 4, 4), 7)
    given = torch.randn(3, 2, 5) if name == "context" else bytes_of(["a bag", "a coat", "schön"], 12)
    layout = dense_layout((4, 4))
    fresh = model.eval()(ids, None, {name: given}, layout)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    assert (fresh == 0).all()
    said, unsaid = (model(ids, None, cond, layout) for cond in ({name: given}, {}))
    assert (said - unsaid).abs().amax((1, 2, 3, 4)).min() > 1e-3
    torch.testing.assert_close(model(ids, None, {name: given * 0}, layout), unsaid, atol=1e-5, rtol=1e-5)
    predict = guide(MaskedObjective(), model, {name: given}, layout, Guidance(3.0))
    guided = predict(ids, torch.zeros_like(ids, dtype=torch.bool))
    torch.testing.assert_close(guided, torch.lerp(unsaid, said, 3.0), atol=1e-4, rtol=1e-5)
    # Light passes over all tokens, with nothing changed, give what the full pass gave.
    context = Context()
    model(ids, None, {name: given}, layout, {"context": context})
    context.chosen = torch.arange(16).expand(3, -1)
    light = model(ids.flatten(2), None, {name: given}, context.layout(layout, 3), {"context": context})
    torch.testing.assert_close(light.flatten(2, -2), said.flatten(2, -2), atol=1e-5, rtol=1e-5)


# The diffusion transformer


@torch.no_grad()
@pytest.mark.parametrize("name", ["context", "text"])
@pytest.mark.parametrize("objective", [Flow(), Edm()], ids=["flow", "edm"])
def test_a_diffusion_transformer_listens_and_zeros_are_nothing(name, objective):
    torch.manual_seed(0)
    options = {"context_dim": 5} if name == "context" else {"text_length": 12}
    attention = {"type": "attention", "num_heads": 2}
    model = DiT(channels=3, num_classes=0, grid=(4, 6), dim=16, depth=2, mixer=attention, **options).eval()
    x, t = torch.randn(3, 3, 4, 6), torch.tensor([0.1, 0.5, 0.9])
    given = torch.randn(3, 2, 5) if name == "context" else bytes_of(["a bag", "a coat", "schön"], 12)
    layout = dense_layout((4, 6))
    assert (model(x, t, {name: given}, layout) == 0).all(), "fresh"
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    said, unsaid = (model(x, t, cond, layout) for cond in ({name: given}, {}))
    assert (said - unsaid).abs().amax((1, 2, 3)).min() > 1e-3
    torch.testing.assert_close(model(x, t, {name: given * 0}, layout), unsaid, atol=1e-5, rtol=1e-5)
    alone = model(x[1:2], t[1:2], {name: given[1:2]}, layout)
    torch.testing.assert_close(alone, said[1:2], atol=1e-5, rtol=1e-5)
    # The predictor reads texts once; guided, its second half is told nothing.
    plain, null, guided = (
        guide(objective, model, cond, layout, Guidance(strength))(x, t.double())[0]
        for cond, strength in (({name: given}, 1.0), ({}, 1.0), ({name: given}, 3.0))
    )
    torch.testing.assert_close(guided, torch.lerp(null, plain, 3.0), atol=1e-4, rtol=1e-5)


def test_a_diffusion_transformer_without_a_context_has_no_attention_to_one():
    attention = {"type": "attention", "num_heads": 2}
    told, plain = (
        DiT(channels=3, num_classes=0, grid=(4, 4), dim=16, depth=1, mixer=attention, patch_size=1, **options)
        for options in ({"context_dim": 5}, {})
    )
    assert {name for name in told.state_dict() if name not in plain.state_dict()} == {
        *(f"blocks.0.cross.{part}.weight" for part in ("q", "kv", "proj")),
        *(f"blocks.0.cross_norm.{part}" for part in ("weight", "bias")),
    }
    with pytest.raises(UsageError, match=r"the context is \[2, 3, 6\], expected \[B, k, 5\]"):
        told(torch.zeros(2, 3, 4, 4), torch.zeros(2), {"context": torch.ones(2, 3, 6)}, dense_layout((4, 4)))


@torch.no_grad()
def test_a_diffusion_transformer_reads_texts_once_for_all_steps():
    mixer = {"type": "attention", "num_heads": 2}
    model = DiT(channels=3, num_classes=0, grid=(4, 4), dim=16, depth=2, mixer=mixer, text_length=4)
    read: list[int] = []
    model.told.text.register_forward_hook(lambda *_: read.append(1))
    for network in (model, SkipBlocks(full_steps=1).start(model)):
        predict = guide(Flow(), network, {"text": bytes_of(["ab", "c"], 4)}, dense_layout((4, 4)), Guidance(2.0))
        read.clear()
        for t in (1.0, 0.7, 0.4, 0.1):
            predict(torch.ones(2, 3, 4, 4), torch.tensor(t))
        assert not read


def test_retrieval_augmented_diffusion_from_recipe_to_another_database(here):
    own = {
        "backbone": {"type": "dit", "dim": 16, "depth": 2, "patch_size": 1, "mixer": GENERATOR["backbone"]["mixer"]},
        "objective": {"type": "flow"},
        "sampler": {"type": "euler", "num_steps": 2, "guidance": 2.0, "reuse": {"type": "skip_blocks"}},
    }
    train(GENERATOR | own | {"name": "rdm", "condition": {"type": "neighbours", "k": 3}}, SHORT)
    pipe = lively("rdm")
    labels, seeds = torch.tensor([8, 1]), [1, 2]
    first = pipe.generate(labels, seeds)
    torch.testing.assert_close(pipe.generate(labels[1:], seeds[1:]), first[1:], atol=1e-4, rtol=0)
    bags = pipe.told.open("fashion:val").of_classes([8])
    assert not torch.equal(pipe.generate(labels[:1], seeds[:1], database=bags), first[:1])


def test_texts_are_read_once_for_all_steps():
    said = Told(dim=8, context_dim=None, text_length=4)
    cond = {"text": bytes_of(["ab", ""], 4)}
    with torch.no_grad():
        once = said.once(cond)
        assert list(once) == ["context"]
        for now, then in zip(said(once), said(cond), strict=True):
            torch.testing.assert_close(now[0, :2], then[0, :2])
        assert torch.equal(said(once)[1], said(cond)[1])
