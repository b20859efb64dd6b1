"""Tokens made once: the dataset of a generator is what its tokenizer made of the images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from genkit import config as configs
from genkit import registry
from genkit.errors import UsageError


def tokenizer_of(config: Mapping[str, Any], device: Any = "cpu") -> tuple[Any, str]:
    """The trained tokenizer a generator's config names, and the fingerprint of its weights."""
    from genkit.pipeline import open_run
    from genkit.weights import module_sha256

    if "type" in config["tokenizer"]:  # nothing to train
        channels = registry.build("data", config["data"]).info.shape[0]
        return registry.build("tokenizer", config["tokenizer"], image_channels=channels), ""
    source = config["tokenizer"]["from"]
    try:
        pipeline = open_run(source, device=device)
    except UsageError as error:
        raise UsageError(f"tokenizer.from={source}: {error}") from None
    return pipeline.tokenizer, module_sha256(pipeline.tokenizer)


def token_dataset(config: Mapping[str, Any], tokenizer: Any, fingerprint: str, root: Path, device: Any = "cpu") -> Any:
    """The tokens of the config's data, from the cache where data and tokenizer are the same, else encoded now."""
    from genkit.console import Progress
    from genkit.data import cache as store
    from genkit.data import packed
    from genkit.data.tokens import Tokens
    from genkit.data.untokenized import Pixelwise

    dataset = registry.build("data", config["data"])
    if isinstance(dataset, Tokens):
        check_cache(dataset, fingerprint, config)
        return dataset
    if "type" in config["tokenizer"]:
        return Pixelwise(dataset, float(tokenizer.pixel_std))
    name = f"{config['data']['type']}-{Path(config['tokenizer']['from']).name}"
    with Progress(total=len(dataset), unit="images", title=f"caching {name}") as progress:
        done = 0

        def show(count: int, total: int) -> None:
            nonlocal done
            progress.advance(count - done)
            done = count

        if hasattr(tokenizer, "code_depth"):  # shapes: tokens of no common number
            return packed.find_or_build(
                tokenizer, dataset, root, name=name, tokenizer_fingerprint=fingerprint, device=device, progress=show
            )
        path = store.find_or_build(
            tokenizer, dataset, root, name=name, tokenizer_fingerprint=fingerprint, device=device, progress=show
        )
    return Tokens(path=str(path))


def check_cache(tokens: Any, fingerprint: str, config: Mapping[str, Any]) -> None:
    """Raises UsageError for a cache named as the data that another tokenizer made: its latents mean something else to this one."""
    if "type" in config["tokenizer"]:
        raise UsageError(
            f"data.path={tokens.path} holds what a tokenizer made, and tokenizer.type={config['tokenizer']['type']} works on images; "
            "set tokenizer.from to the tokenizer's run, or data to the images"
        )
    if tokens.meta["tokenizer_fingerprint"] != fingerprint:
        raise UsageError(
            f"data.path={tokens.path} is stale: it was made by a tokenizer with weights {tokens.meta['tokenizer_fingerprint'][:8]}, and tokenizer.from="
            f"{config['tokenizer']['from']} has {fingerprint[:8]} now. Make it again with `genkit cache` from a recipe whose data are the images, or "
            "name the tokenizer it was made by"
        )


def cache(
    config: str | Path | Mapping[str, Any],
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    out: str = "cache",
    device: str | None = None,
) -> dict[str, Any]:
    """Encode the data of a generator's recipe with its tokenizer. Training does the same when it finds no cache.

    An interrupted call continues when it is repeated.

    Returns: path, number of samples, grid, whether mirrored images are in it; of ids codebook usage and perplexity, of continuous latents their mean and
        standard deviation channel by channel.
    """
    resolved = configs.resolve(config, overrides)
    if resolved.task != "generate":
        raise UsageError(
            f"{resolved.file} trains a tokenizer; caching needs the recipe of a generator (with a section `backbone`)"
        )
    if "type" in resolved["tokenizer"]:
        raise UsageError(f"{resolved.file} works on pixels; there is nothing to encode")
    tokenizer, fingerprint = tokenizer_of(resolved, device or "cpu")
    tokens = token_dataset(resolved, tokenizer, fingerprint, Path(out), device or "cpu")
    keys = ["grid", "mirrored", *(("codebook_size", "codebook_usage", "perplexity") if tokens.word == "ids" else ())]
    figures = {key: tokens.meta[key] for key in keys if key in tokens.meta}
    if tokens.word == "z":
        figures |= {key: [round(value, 4) for value in tokens.meta[key]] for key in ("latent_mean", "latent_std")}
    return {"path": str(tokens.path), "samples": len(tokens), **figures}
