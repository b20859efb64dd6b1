"""YAML + key=value -> checked plain data.

Later wins: defaults < `extends:` parents < the file < `key=value`. Mappings merge, lists replace, `key=null` resets, `key+=value` appends.
Paths inside a recipe are relative to the working directory, only `extends:` is relative to the recipe. The result holds every default and is
saved with the run, so that a run explains itself.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from genkit import registry
from genkit.errors import UsageError, nearest
from genkit.fitting import check_backbone, check_reuse, check_sampler


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Train(_Section):
    """The training loop. Progress is counted in samples; the global batch is the unit, whatever the number of processes."""

    num_samples: int = Field(gt=0, description="samples to train on, all processes together")
    batch_size: int = Field(64, gt=0, description="global batch per optimiser step, all processes together")
    micro_batch_size: int | None = Field(
        None, gt=0, description="samples per forward pass of one process; null = all of its share"
    )
    lr: float = Field(1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.0, ge=0, description="on matrices only; norms, biases, embeddings are exempt")
    clip: float | None = Field(1.0, gt=0, description="largest gradient norm; null = off")
    warmup_samples: int = Field(0, ge=0)
    schedule: Literal["constant", "cosine"] = "cosine"
    ema: float | None = Field(0.999, gt=0, lt=1, description="decay per optimiser step; null = off")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto = fp32 on a CPU, bf16 on a GPU that has it"
    )
    seed: int = Field(0, ge=0, lt=2**31, description="a sample adds its number to 2^32 times the seed, in 64 bits")
    one_size_batches: bool = Field(
        False,
        description="of data in sizes of their own: every batch has images of one size, for backbones that take no padding",
    )
    init: str | None = Field(
        None,
        description="a run, checkpoint or imported pipeline whose weights training starts from; the steps, the averages and the optimiser start anew",
    )
    init_new: list[str] = Field(
        default_factory=list,
        description="patterns of parameters that do not come from there: 'label.*' for other classes",
    )
    num_workers: int = Field(0, ge=0, description="processes that load data; 0 suits data held in memory")
    max_bad_steps: int = Field(
        5, ge=1, description="stop after this many steps in a row with a loss that is not finite"
    )


class Log(_Section):
    """What a run writes while it trains. These keys may change when a run is continued."""

    every_steps: int = Field(50, gt=0)
    sample_every_steps: int = Field(500, gt=0, description="fixed-noise sample grid or reconstruction grid")
    save_every_steps: int = Field(500, gt=0)
    eval_every_steps: int | None = Field(
        None, gt=0, description="save and evaluate with the recipe's metrics; null = only when asked"
    )
    best: str | None = Field(
        None, description="the metric that checkpoints/best follows, by name; null = the first that can be better"
    )
    keep: int = Field(2, ge=1, description="checkpoints kept; the best one stays as well")
    num_images: int = Field(20, gt=0, description="images in a grid")


class Sampler(_Section):
    """What every sampler section may hold beside its sampler's own options."""

    guidance: float = Field(
        1.0, ge=0, description="classifier-free guidance, 1 = off: out = uncond + guidance (cond - uncond)"
    )
    guidance_schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant",
        description="linear, cosine: from 1 to guidance with the fraction already known, or with the noise removed",
    )
    guidance_power: float = Field(
        1.0, gt=0, description="of linear and cosine: that fraction to this power, so that guidance comes later"
    )
    guidance_over: Literal["known", "steps"] = Field(
        "known", description="of masked generators: the fraction is that of known tokens, or of the steps done"
    )
    guidance_interval: tuple[float, float] = Field(
        (0.0, 1.0), description="of latents: guided only while t, 0 = data and 1 = noise, is in it"
    )
    guidance_channels: int | None = Field(
        None, ge=1, description="of latents: only so many channels are guided; DiT and SiT were published with 3"
    )
    guidance_weak: str | None = Field(
        None,
        description="a run or checkpoint of a worse model: guided away from it instead of from no label (autoguidance)",
    )
    reuse: Annotated[dict[str, Any], registry.Nested("reuse")] | None = Field(
        None, description="what is kept from step to step instead of computed anew; null = nothing"
    )


FIXED: dict[str, type[_Section]] = {"train": Train, "log": Log}
SECTIONS = (
    "name",
    "extends",
    "data",
    "tokenizer",
    "backbone",
    "condition",
    "objective",
    "sampler",
    "metrics",
    "train",
    "log",
)
# Keys that may differ when a run is continued: they change what is written, not what is computed.
FREE = ("log.", "train.num_workers", "train.micro_batch_size", "extends")


class Config(dict[str, Any]):
    """Checked plain data, with where each key was set (`places`) and the file it came from (`file`)."""

    places: dict[str, str]
    file: str

    def where(self, path: str) -> str:
        """Where a dotted key was set: itself, else its nearest parent that was written down."""
        while path:
            if path in self.places:
                return self.places[path]
            path = path.rpartition("[" if path.endswith("]") else ".")[0]
        return self.file

    @property
    def task(self) -> str:
        """ "generate" when there is a backbone to train, else "tokenize"."""
        return "generate" if self.get("backbone") else "tokenize"


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-4 as a string; everybody who writes it means a number."""


_Loader.yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def parse(text: str) -> Any:
    """One YAML value, as written on the right of `key=value`."""
    return yaml.load(text, Loader=_Loader)


def _read(path: Path, places: dict[str, str], children: tuple[Path, ...] = ()) -> dict[str, Any]:
    """One YAML file as a mapping, on top of what it extends; every dotted key's line goes into `places`."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"no such recipe: {path}; `genkit ls recipes` lists the ones that come with genkit") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        data = loader.construct_document(node) if node is not None else {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UsageError(f"{path}{line} is not valid YAML: {getattr(error, 'problem', error)}") from None
    finally:
        loader.dispose()
    if not isinstance(data, dict):
        raise UsageError(f"{path} must be a mapping of sections, found {type(data).__name__}")

    def mark_lines(node: yaml.Node, prefix: str) -> None:
        if isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, value in node.value:
                dotted = f"{prefix}{key.value}"
                if key.value in seen:
                    raise UsageError(f"{dotted} is written twice [{path.name}:{key.start_mark.line + 1}]")
                seen.add(key.value)
                places[dotted] = f"{path.name}:{key.start_mark.line + 1}"
                mark_lines(value, f"{dotted}.")
        elif isinstance(node, yaml.SequenceNode):
            for i, item in enumerate(node.value):
                mark_lines(item, f"{prefix[:-1]}[{i}].")

    if node is not None:
        mark_lines(node, "")
    parent = data.get("extends")
    if parent is None:
        return data
    if not isinstance(parent, str):
        raise UsageError(f"extends must be the path of a recipe, found {parent!r} [{places['extends']}]")
    chain = (*children, path.resolve())
    above = (path.parent / parent).resolve()
    if above in chain:
        raise UsageError(f"{above.name} extends itself [{places['extends']}]")
    inherited: dict[str, str] = {}
    base = _read(above, inherited, chain)
    for dotted, place in inherited.items():
        places.setdefault(dotted, place)
    return _merge(base, data)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Mappings merge key by key; a part whose `type` changes starts afresh, since its options are another part's."""
    if "type" in over and over["type"] != base.get("type", over["type"]):
        return copy.deepcopy(over)
    merged = copy.deepcopy(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else copy.deepcopy(value)
    return merged


def _override(data: dict[str, Any], text: str, places: dict[str, str]) -> None:
    key, sign, value_text = text.partition("=")
    append = key.endswith("+")
    path = key.rstrip("+").strip()
    if not sign or not path:
        raise UsageError(f"'{text}' is not key=value; write for example train.lr=3e-4")
    try:
        value = parse(value_text)
    except yaml.YAMLError as error:
        raise UsageError(f"the value of '{text}' is not valid YAML: {getattr(error, 'problem', error)}") from None
    node: Any = data
    *parents, last = path.split(".")
    for depth, word in enumerate(parents):
        if node.get(word) is None:
            node[word] = {}
        node = node[word]
        if not isinstance(node, dict):
            raise UsageError(f"'{text}': {'.'.join(parents[: depth + 1])} is {node!r}, which has no keys")
    if append:
        if not isinstance(node.get(last) or [], list):
            raise UsageError(f"'{text}': {path} is {node[last]!r}, not a list")
        node[last] = [*(node.get(last) or []), value]
    elif last == "type" and node.get("type") not in (None, value):
        node.clear()
        node["type"] = value
    else:
        node[last] = value
    places[path] = f"command line: {text}"


def load(file: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read, merge and check a recipe. Raises UsageError naming the key, the nearest known one and the line."""
    path = Path(file)
    places: dict[str, str] = {}
    data = _read(path, places)
    for text in overrides:
        _override(data, text, places)
    return check(data, file=path.name, places=places, name=path.stem)


def resolve(
    config: str | Path | Mapping[str, Any], overrides: Sequence[str] | Mapping[str, Any] = (), name: str | None = None
) -> Config:
    """A recipe by path or as a mapping, with overrides as "key=value" or as a mapping, and the name of the run."""
    texts = (
        [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
        if isinstance(overrides, Mapping)
        else list(overrides)
    )
    if name is not None:
        texts.append(f"name={json.dumps(name)}")
    if not isinstance(config, Mapping):
        return load(config, texts)
    places: dict[str, str] = {}
    data = copy.deepcopy(dict(config))
    for text in texts:
        _override(data, text, places)
    return check(data, places=places, name="run")


def check(data: dict[str, Any], file: str = "", places: dict[str, str] | None = None, name: str = "") -> Config:
    """Check every section of a merged mapping against its parts' constructors and fill in the defaults."""
    config = Config()
    config.places, config.file = places or {}, file

    def at(path: str) -> str:
        place = config.where(path)
        return f" [{place}]" if place else ""

    for key in data:
        if key not in SECTIONS:
            raise UsageError(f"unknown section {key}; {nearest(str(key), SECTIONS)}{at(str(key))}")
    config["name"] = str(data.get("name") or name)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", config["name"]):
        raise UsageError(f"name={config['name']!r} must be letters, digits, '.', '_' or '-'{at('name')}")
    for section in ("data", "train"):
        if not data.get(section):
            raise UsageError(f"{file or 'the config'} has no section `{section}`{at(section)}")
    config["data"] = registry.check("data", data["data"], "data", config.where)
    tokenizer = data.get("tokenizer")
    if data.get("backbone"):
        if isinstance(tokenizer, dict) and tokenizer.get("type") == "pixels":
            config["tokenizer"] = registry.check("tokenizer", tokenizer, "tokenizer", config.where)
        elif isinstance(tokenizer, dict) and set(tokenizer) == {"from"}:
            config["tokenizer"] = {"from": str(tokenizer["from"])}
        else:
            raise UsageError(
                f"a generator needs a trained tokenizer, tokenizer: {{from: runs/NAME}}, or none, {{type: pixels}}; found {tokenizer!r}{at('tokenizer')}"
            )
        config["backbone"] = registry.check("backbone", data["backbone"], "backbone", config.where)
        config["condition"] = registry.check(
            "condition", data.get("condition") or {"type": "label"}, "condition", config.where
        )
    else:
        config["tokenizer"] = registry.check("tokenizer", tokenizer, "tokenizer", config.where)
        if config["tokenizer"]["type"] == "pixels":
            raise UsageError(
                f"tokenizer.type=pixels has nothing to train; add a section `backbone`{at('tokenizer.type')}"
            )
        if data.get("condition"):
            raise UsageError(f"a tokenizer is told nothing; remove the section `condition`{at('condition')}")
    config["objective"] = registry.check("objective", data.get("objective"), "objective", config.where)
    if "backbone" in config:
        check_backbone(config["backbone"], config["objective"], config.where("backbone.type"))
    for section, kind, called in (("sampler", dict, "mapping"), ("metrics", list, "list")):
        if data.get(section) and not isinstance(data[section], kind):
            raise UsageError(f"{section} must be a {called}, found {data[section]!r}{at(section)}")
    if data.get("sampler"):
        config["sampler"] = _sampler(data["sampler"], config)
        check_sampler(config["sampler"], config["objective"], config.where("sampler.type"))
        check_reuse(config["sampler"], config["objective"], config.where("sampler.reuse"))
    elif data.get("backbone"):
        raise UsageError(f"a generator needs a section `sampler`{at('backbone')}")
    config["metrics"] = [
        registry.check("metrics", metric, f"metrics[{i}]", config.where)
        for i, metric in enumerate(data.get("metrics") or [])
    ]
    for section, model in FIXED.items():
        config[section] = _fixed(model, data.get(section) or {}, section, config)
    return config


def with_sampler(section: Mapping[str, Any], changes: Mapping[str, Any] | Sequence[str]) -> dict[str, Any]:
    """A checked section `sampler` with changes, "num_steps=20" or {"reuse": {...}}. A sampler of another type keeps what all of them have: guidance, reuse.

    Raises: UsageError as for a recipe.
    """
    texts = [f"{k}={json.dumps(v)}" for k, v in changes.items()] if isinstance(changes, Mapping) else changes
    config = Config()
    config.places, config.file = {}, ""
    data = {"sampler": copy.deepcopy(dict(section))}
    for text in texts:
        common = {key: value for key, value in data["sampler"].items() if key in Sampler.model_fields}
        _override(data, f"sampler.{text}", config.places)
        data["sampler"] = common | data["sampler"]
    return _sampler(data["sampler"], config)


def _sampler(values: dict[str, Any], config: Config) -> dict[str, Any]:
    """The section `sampler`: options of its own, what all have, and the kind of reuse."""
    own = {key: value for key, value in values.items() if key not in Sampler.model_fields}
    common = {key: value for key, value in values.items() if key in Sampler.model_fields}
    found = registry.check("sampler", own, "sampler", config.where) | _fixed(Sampler, common, "sampler", config)
    if found["reuse"] is not None:
        found["reuse"] = registry.check("reuse", found["reuse"], "sampler.reuse", config.where)
    return found


def _fixed(model: type[_Section], values: Any, section: str, config: Config) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise UsageError(f"{section} must be a mapping, found {values!r} [{config.where(section)}]")
    # null where null is no value of its own: the default.
    values = {
        key: value
        for key, value in values.items()
        if value is not None
        or key not in model.model_fields
        or registry.accepts_null(model.model_fields[key].annotation)
    }
    try:
        return json.loads(model.model_validate(values).model_dump_json())
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join([section, *map(str, problem["loc"])])
        place = config.where(key)
        at = f" [{place}]" if place else ""
        if problem["type"] == "extra_forbidden":
            raise UsageError(
                f"unknown key {key}; {nearest(str(problem['loc'][0]), list(model.model_fields))}{at}"
            ) from None
        if problem["type"] == "missing":
            raise UsageError(f"{key} is missing{at}") from None
        raise UsageError(f"{key}={problem['input']!r}: {problem['msg'].lower()}{at}") from None


def flatten(data: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys; lists of parts by number."""
    if isinstance(data, dict) and data:
        items = [(f"{prefix}.{key}" if prefix else str(key), value) for key, value in data.items()]
    elif isinstance(data, list) and any(isinstance(item, dict) for item in data):
        items = [(f"{prefix}[{i}]", value) for i, value in enumerate(data)]
    else:
        return {prefix: data}
    return {key: leaf for path, value in items for key, leaf in flatten(value, path).items()}


def diff(old: dict[str, Any], new: dict[str, Any], free: tuple[str, ...] = ()) -> list[str]:
    """Lines `key: old -> new` for every dotted key that differs, except those that start with a word in `free`."""
    a, b = flatten(old), flatten(new)
    missing = "(not set)"
    return [
        f"{key}: {a.get(key, missing)} -> {b.get(key, missing)}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key, missing) != b.get(key, missing) and not key.startswith(free)
    ]


def dump(config: dict[str, Any]) -> str:
    """The config as YAML, in reading order."""
    return yaml.safe_dump(json.loads(json.dumps(config)), sort_keys=False, allow_unicode=True, width=120)


def digest(config: dict[str, Any]) -> str:
    """A hash of what is computed: equal configs give equal runs."""
    kept = {key: value for key, value in flatten(config).items() if not key.startswith(FREE)}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]
