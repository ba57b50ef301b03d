"""From the command line to a checked `Config`, without JAX.

Hydra composes `configs/` into a DictConfig (`compose`); `resolve` turns it into a `Config` of
`ttt.knobs` once, and reports every fault at once, those between fields (`_RELATIONS`) included.
"""

import difflib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ttt import experiment_rules, mixers
from ttt.errors import UserError
from ttt.globs import matches
from ttt.knobs import Config, ModelConfig, Rule

# ---- rules between values ------------------------------------------------------------


class Relation(NamedTuple):
    """A rule on the values of `keys` together; `message` gives the rule and the remedy."""

    keys: tuple[str, ...]
    holds: Callable[..., bool]
    message: str


_OUTER = "training.optimizer_outer"
_LEARNING = [kind for kind in mixers.MIXERS.values() if "meta" in kind.train_modes]

_RELATIONS = (
    Relation(
        ("model.head_dim", "model.hidden_size", "model.num_attention_heads"),
        lambda head_dim, width, heads: head_dim % 2 == 0,
        "rotation turns pairs, so heads must have an even width; make hidden_size a multiple of "
        "2 x num_attention_heads, or set head_dim",
    ),
    Relation(
        ("model.num_attention_heads", "model.num_key_value_heads"),
        lambda heads, kv_heads: heads % kv_heads == 0,
        "every head of keys and values must serve as many query heads; make num_key_value_heads a "
        "divisor of num_attention_heads",
    ),
    Relation(
        ("model.seq_modeling_block", "model.layer_types"),
        lambda short, names: (short == "") != (names == ()),
        "the layers have one mixer or a cycle of several; set one of the two, and "
        "model.seq_modeling_block='' or model.layer_types=[] for the other",
    ),
    Relation(
        ("model.layer_types", "model.num_hidden_layers"),
        lambda names, layers: len(names) <= layers,
        "no layer reaches the last entries of the cycle; shorten layer_types",
    ),
    Relation(
        ("model.suffix_len", "model.num_hidden_layers"),
        lambda suffix, layers: suffix <= layers,
        "the suffix is a part of the layers; lower suffix_len",
    ),
    *(
        Relation(
            (f"model.{token}_token_id", "model.vocab_size"),
            lambda token, vocab: token < vocab,
            "a token id must be below vocab_size; set both as the tokenizer has them",
        )
        for token in ("bos", "eos")
    ),
    Relation(
        ("training.seq_length", "model.mini_batch_size"),
        lambda length, chunk: length % chunk == 0,
        "a sequence must be whole chunks; make seq_length a multiple of mini_batch_size",
    ),
    Relation(
        ("model.mini_batch_size", "model.attention_block"),
        lambda chunk, block: block == 0 or chunk % block == 0,
        "a chunk must be whole blocks; make attention_block a divisor of mini_batch_size, or 0",
    ),
    Relation(
        ("training.global_batch_size", "training.accum_steps"),
        lambda batch, parts: batch % parts == 0,
        "microbatches must be equal; make global_batch_size a multiple of accum_steps",
    ),
    Relation(
        ("training.runtime_mode", "backend.distributed"),
        lambda mode, distributed: mode == "jax" or not distributed,
        "the light modes run in one process; set backend.distributed=false, or runtime_mode=jax",
    ),
    Relation(
        ("training.train_mode", "model.seq_modeling_block", "model.layer_types"),
        lambda mode, short, names: (
            not (short or names) or mode in mixers.train_modes(mixers.cycle(short, names))
        ),
        f"test-time training runs on {' or '.join(kind.title for kind in _LEARNING)}; set "
        f"model.seq_modeling_block={' or '.join(kind.short for kind in _LEARNING)} and "
        "model.layer_types=[]",
    ),
    Relation(
        ("training.train_mode", "model.suffix_len"),
        lambda mode, suffix: mode != "meta" or suffix > 0,
        "test-time training needs suffix blocks; raise suffix_len, or set train_mode=pretrain",
    ),
    Relation(
        ("training.train_mode", "model.prime"),
        lambda mode, prime: mode != "meta" or prime,
        "test-time training updates the prime MLPs; set model.prime=true, or train_mode=pretrain",
    ),
    Relation(
        (f"{_OUTER}.lr_warmup_steps", f"{_OUTER}.lr_decay_steps"),
        lambda warmup, decay: warmup < decay,
        "the warm-up must end before the decay does; lower lr_warmup_steps or raise lr_decay_steps",
    ),
    Relation(
        tuple(
            f"{_OUTER}.{key}"
            for key in ("schedule", "lr_warmup_steps", "lr_decay_start", "lr_decay_steps")
        ),
        lambda schedule, warmup, start, end: schedule != "wsd" or warmup <= start <= end,
        "the decay must begin after the warm-up and before its own end; set lr_decay_start between "
        "lr_warmup_steps and lr_decay_steps",
    ),
    *(
        Relation(
            (f"{_OUTER}.{end}", f"{_OUTER}.lr"),
            lambda end, peak: end <= peak,
            "the schedule cannot start or end above its peak; lower it or raise lr",
        )
        for end in ("init_lr", "end_lr")
    ),
    Relation(
        ("training.load_part", "training.resume_exp_name"),
        lambda part, name: (part == "none") == (name == ""),
        "loading needs a part and a run; set load_part=params (or all) and resume_exp_name=NAME, "
        "or load_part=none and resume_exp_name=''",
    ),
    Relation(
        ("training.dataset_name", "training.dummy_dataset", "deploy_paths.data"),
        lambda name, dummy, data: dummy or name in data,
        "this dataset has no place; add +deploy_paths.data.NAME=FOLDER, or name one that has",
    ),
    Relation(
        ("training.log_wandb", "training.wandb_project"),
        lambda log, project: not log or project != "",
        "W&B needs a project; set training.wandb_project=NAME or training.log_wandb=false",
    ),
    Relation(
        ("generate.prompt", "generate.prompt_file"),
        lambda prompt, file: not prompt or not file,
        "there can be one prompt; leave generate.prompt or generate.prompt_file empty",
    ),
    Relation(
        ("generate.stop", "model.vocab_size"),
        lambda ids, vocab: all(i < vocab for i in ids),
        "a stop token must be below vocab_size; write ids of the model's tokenizer",
    ),
    Relation(
        ("backend.fake_devices", "backend.platform"),
        lambda count, platform: count == 0 or platform in ("auto", "cpu"),
        "only CPU devices can be pretended; set backend.platform=cpu or backend.fake_devices=0",
    ),
    Relation(
        ("backend.coordinator_address", "backend.num_processes", "backend.process_id"),
        lambda address, count, number: (
            -1 < number < count if address else (count, number) == (0, -1)
        ),
        "a cluster by hand needs all three, process_id below num_processes; set all or none",
    ),
    Relation(
        ("backend.coordinator_address", "backend.distributed"),
        lambda address, distributed: not address or distributed,
        "processes must join to share a run; set backend.distributed=true",
    ),
    Relation(
        ("backend.state_parallel", "model.num_key_value_heads", "model.intermediate_size"),
        lambda state, heads, inner: heads % state == 0 and inner % state == 0,
        "devices that share tensors must get whole heads and equal parts of the MLPs; "
        "make state_parallel a divisor of both",
    ),
)


# ---- from a composed DictConfig to a Config ------------------------------------------


class ConfigError(UserError):
    """All that is wrong with a configuration, fault by fault in `faults`."""

    def __init__(self, faults: Iterable[str]):
        self.faults: tuple[str, ...] = tuple(faults)
        super().__init__(self.faults)

    def __str__(self) -> str:
        count = len(self.faults)
        lines = (f"  {i}. {fault}" for i, fault in enumerate(self.faults, 1))
        return "\n".join([f"{count} fault{'s' * (count > 1)} in the configuration:", *lines])


def resolve(cfg: DictConfig) -> Config:
    """Check `cfg` against every rule and freeze it.

    Raises ConfigError with all unknown or missing keys, wrong types and broken rules, or UserError
    if neither a model nor an experiment is named.
    """
    if all(OmegaConf.select(cfg, key) is None for key in ("model.name", "training.exp_name")):
        raise UserError(
            "no experiment named: add +experiment=NAME, such as "
            "+experiment=tiny/pretrain/pretrain-tiny-e2e; train --help says more. There are:\n"
            + _experiment_list()
        )
    values, faults = _read(cfg)
    for relation in _RELATIONS:
        present = {key: values[key] for key in relation.keys if key in values}
        if len(present) == len(relation.keys) and not relation.holds(*present.values()):
            shown = ", ".join(_show(key, value) for key, value in present.items())
            faults.append(f"{shown}: {relation.message}")
    if faults:
        raise ConfigError(faults)
    config = _build(Config, values)
    spec, fast = config.training.spec_inner, _can_be_fast(config.model)
    if config.training.train_mode == "meta" and not any(
        matches(glob, name) for glob in spec for name in fast
    ):
        raise ConfigError(
            [
                f"{_show('training.spec_inner', spec)}: no parameter of the suffix is matched; for "
                "the prime MLPs write ['language_model.**.suffix_blocks.feed_forward_prime.**']"
            ]
        )
    return config


_SUFFIX = "language_model.model.h.suffix_blocks"


def _can_be_fast(model: ModelConfig) -> list[str]:
    """Names of what runs chunk by chunk, in all variants of the blocks around the mixers."""
    suffix = mixers.layers(model)[model.num_hidden_layers - model.suffix_len :]
    weights = {f"seq_modeling_block.{name}" for mixer in suffix for name in mixer.weights()}
    weights |= {
        f"{mlp}.{w}.weight" for mlp in ("feed_forward", "feed_forward_prime") for w in _MLP_WEIGHTS
    }
    weights |= {f"{part}_{side}norm.weight" for part in _NORMED for side in ("", "post_")}
    head = ("language_model.model.ln_f.weight", "language_model.lm_head.weight")
    return [*(f"{_SUFFIX}.{name}" for name in sorted(weights)), *head]


_MLP_WEIGHTS = ("w1", "w2", "w3")
_NORMED = ("seq", "ffn", "ffn_prime")


def _leaves(section: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, type) of every field below `section`."""
    for name, kind in get_type_hints(section, include_extras=True).items():
        if is_dataclass(kind):
            yield from _leaves(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, kind


_LEAVES: dict[str, Any] = dict(_leaves(Config))
_RULE_INPUTS = frozenset({"size"})  # read by the rules in configs/, not by the framework
_SECRETS = frozenset({"training.wandb_key"})
_MASK = "***"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return _is_number(value) and value == int(value)


def _are_texts(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


# What a value must look like in YAML to be taken for a type; 1e6 is a whole number.
_TYPES: dict[Any, Rule] = {
    bool: Rule(lambda v: isinstance(v, bool), "must be true or false; choose one"),
    int: Rule(_is_whole, "must be a whole number; write one"),
    float: Rule(_is_number, "must be a finite number; write one"),
    str: Rule(lambda v: isinstance(v, str), "must be text; quote what looks otherwise: \"'123'\""),
    tuple[str, ...]: Rule(
        lambda v: isinstance(v, list) and _are_texts(v), "must be a list of texts; write [a,b]"
    ),
    tuple[int, ...]: Rule(
        lambda v: isinstance(v, list) and all(map(_is_whole, v)),
        "must be a list of whole numbers; write [1,2]",
    ),
    tuple[float, ...]: Rule(
        lambda v: isinstance(v, list) and all(map(_is_number, v)),
        "must be a list of numbers; write [1.0,2.0]",
    ),
    Mapping[str, str]: Rule(
        lambda v: isinstance(v, dict) and _are_texts(v.values()),
        "must be names with texts; write {a: b}",
    ),
}


class _FaultError(ValueError):
    """Rule and remedy for one value."""


def _read(cfg: DictConfig) -> tuple[dict[str, Any], list[str]]:
    """Sound values by dotted key, and a fault for every other."""
    values: dict[str, Any] = {}
    faults: dict[str, str] = {}
    for key, kind in _LEAVES.items():
        try:
            value = OmegaConf.select(cfg, key)
            if OmegaConf.is_config(value):
                value = OmegaConf.to_container(value, resolve=True, throw_on_missing=True)
            if value is None:
                faults[key] = f"{key}=???: must be set; add {key}=VALUE"
            else:
                values[key] = _checked(kind, value)
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            faults[key] = f"{key}={_raw(cfg, key)}: cannot be derived ({reason}); set it"
        except _FaultError as fault:
            faults[key] = f"{_show(key, value)}: {fault}"
    # Of a faulty setting and those that follow from it, the first alone is worth reading.
    roots = [text for key, text in faults.items() if not _inputs(_raw(cfg, key)) & faults.keys()]
    return values, [*_unknown_keys(cfg, Config), *roots]


def _inputs(raw: Any) -> set[str]:
    """Settings that an interpolation reads."""
    return set(re.findall(r"[a-z_]+(?:\.\w+)+", str(raw))) if "${" in str(raw) else set()


def _raw(cfg: DictConfig, key: str) -> Any:
    """The value at `key` as it is written, interpolations and all; None if there is none."""
    node: Any = OmegaConf.to_container(cfg, resolve=False)
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


def _checked(kind: Any, value: Any) -> Any:
    """`value` as the type `kind` and within its rules. Raises _FaultError."""
    base, *rules = get_args(kind) if get_origin(kind) is Annotated else (kind,)
    if not _TYPES[base].holds(value):
        raise _FaultError(_TYPES[base].message)
    if not isinstance(value, dict):
        value = (get_origin(base) or base)(value)
    for rule in rules:
        if not rule.holds(value):
            parts = value if isinstance(value, tuple) else (value,)
            wrong = [part for part in parts if part not in rule.names]
            hints = dict.fromkeys(_did_you_mean(part, rule.names) for part in wrong)
            raise _FaultError(rule.message + "".join(hints))
    return value


def _unknown_keys(node: Any, section: type, prefix: str = "") -> Iterator[str]:
    """Faults of keys that no field answers to, at any depth."""
    kinds = get_type_hints(section)
    for key in node:
        if key in kinds:
            child = None if not is_dataclass(kinds[key]) else OmegaConf.select(node, key)
            if isinstance(child, DictConfig):
                yield from _unknown_keys(child, kinds[key], f"{prefix}{key}.")
        elif prefix or key not in _RULE_INPUTS:
            name = f"{prefix}{key}"
            yield f"{name}: no such setting; remove it" + _did_you_mean(name, _LEAVES)


def _build(section: type, values: Mapping[str, Any], prefix: str = "") -> Any:
    return section(
        **{
            name: _build(kind, values, f"{prefix}{name}.")
            if is_dataclass(kind)
            else values[prefix + name]
            for name, kind in get_type_hints(section).items()
        }
    )


def _show(key: str, value: Any) -> str:
    return f"{key}={_MASK if key in _SECRETS and value else value}"


def _did_you_mean(name: Any, options: Iterable[str]) -> str:
    """The end of a message: the `options` whose last segment is closest to that of `name`."""
    by_last: dict[str, list[str]] = {}
    for option in options:
        by_last.setdefault(option.split(".")[-1], []).append(option)
    close = difflib.get_close_matches(str(name).split(".")[-1], by_last, n=1)
    return f"; did you mean {' or '.join(by_last[close[0]])}?" if close else ""


# ---- records of a Config -------------------------------------------------------------

# Settings that leave a run's numbers as they are: a run may go on under another value of them.
_NEUTRAL = frozenset(
    {
        # where things lie, and what the run is called
        "deploy_paths.**",
        "training.exp_*",
        "training.resume_exp_folder",
        # the hardware: the same mathematics in another order of summation
        "backend.**",
        "training.accum_steps",
        # what is kept for the backward pass and what is computed again
        "model.remat_*",
        "model.loss_block",
        "model.attention*",
        "training.inner_remat_freq",
        "training.inner_gradient",
        # the length of the run: the schedule has its own keys
        "training.total_steps",
        # looking on: logs, evaluations, checkpoints
        "training.log_*",
        "training.wandb_*",
        "training.eval_*",
        "training.count_model_*",
        "training.sample_*",
        "training.save_*",
        "training.keep_checkpoints",
        # what to do where the run would end otherwise
        "training.skip_bad_steps",
        "benchmark.**",
        "evaluation.**",
        "generate.**",
        # the permission to differ
        "training.allow_config_change",
    }
)


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dicts and lists for JSON or YAML, secrets masked."""
    return _plain(asdict(config))


def _plain(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for name, value in section.items():
        key = prefix + name
        if isinstance(value, Mapping):
            plain[name] = _plain(value, f"{key}.")
        elif isinstance(value, tuple):
            plain[name] = list(value)
        else:
            plain[name] = _MASK if key in _SECRETS and value else value
    return plain


# Which program computes a model: a choice of the machine at hand, not of the one that trained it.
_PROGRAMS = ("attention", "loss_block")


def with_stored(config: Config, stored: Mapping[str, Any]) -> Config:
    """`config` with model and training as a `to_dict` result has them, such as a manifest's.

    What `stored` lacks, and the choice of programs, stays as `config` has it. Raises ConfigError.
    """
    nested, stored = to_dict(config), upgraded(stored)
    for section in ("model", "training"):
        known = {k: v for k, v in stored.get(section, {}).items() if k in nested[section]}
        nested[section] |= {k: v for k, v in known.items() if k not in _PROGRAMS}
    nested["deploy_paths"]["data"] = _place_of_dataset(stored) | nested["deploy_paths"]["data"]
    return resolve(OmegaConf.create(nested))


def stored_settings(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Model and training of a `to_dict` result, as far as this version has the settings.

    And the place of its dataset, where the configs have none.
    """
    stored = upgraded(stored)
    default = OmegaConf.load(config_dir() / "deploy" / "default.yaml")
    data = {
        name: place
        for name, place in _place_of_dataset(stored).items()
        if name not in default.deploy_paths.data
    }
    sections = {name: _known(stored.get(name, {}), f"{name}.") for name in ("model", "training")}
    model, training = sections.values()
    names = mixers.cycle(model.get("seq_modeling_block", ""), model.get("layer_types", ()))
    one_chunk = model.get("mini_batch_size") == training.get("seq_length")
    if one_chunk and all(mixers.MIXERS[name].grows for name in names):  # it stays one
        model["mini_batch_size"] = "${training.seq_length}"
    return sections | ({"deploy_paths": {"data": data}} if data else {})


def _place_of_dataset(stored: Mapping[str, Any]) -> dict[str, str]:
    """The dataset that a run was trained on, and where it lay."""
    name = stored.get("training", {}).get("dataset_name", "")
    places = stored.get("deploy_paths", {}).get("data", {})
    return {name: places[name]} if name in places else {}


def of_stored(stored: Mapping[str, Any]) -> Config:
    """The configuration of a `to_dict` result, such as a manifest's, on this machine's paths."""
    flat = _flat(stored_settings(stored))
    added = ("deploy_paths.data.",)
    return resolve(
        compose([f"{'+' * key.startswith(added)}{key}={json.dumps(v)}" for key, v in flat.items()])
    )


def _known(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    known = {}
    for name, value in values.items():
        key = prefix + name
        if key in _LEAVES:
            known[name] = value
        elif isinstance(value, Mapping) and any(leaf.startswith(f"{key}.") for leaf in _LEAVES):
            known[name] = _known(value, f"{key}.")
    return known


def upgraded(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A `to_dict` result with what older versions did where they had no setting."""
    model = dict(stored.get("model", {}))
    if heads := model.get("num_attention_heads"):
        since = {"layer_types": [], "num_key_value_heads": heads, "attention_bias": False}
        since["rope_scaling"] = []
        model = since | {"head_dim": model["hidden_size"] // heads} | model
    training = dict(stored.get("training", {}))
    outer = dict(training.get("optimizer_outer", {}))
    if steps := outer.get("lr_decay_steps"):
        since = {"schedule": "cosine", "lr_decay_start": share_of_steps(steps, 0.8)}
        training["optimizer_outer"] = since | outer
    return {**stored, "model": model, "training": training}


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings that change a run's numbers and differ between two `to_dict` results, as (a's, b's).

    A setting that one of them lacks counts as None there.
    """
    left, right = _flat(upgraded(a)), _flat(upgraded(b))
    return {
        key: (left.get(key), right.get(key))
        for key in sorted(left.keys() | right.keys())
        if left.get(key) != right.get(key) and not any(matches(glob, key) for glob in _NEUTRAL)
    }


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        flat |= (
            _flat(value, f"{prefix}{name}.")
            if isinstance(value, Mapping)
            else {prefix + name: value}
        )
    return flat


# ---- composing -----------------------------------------------------------------------


def config_dir() -> Path:
    """The folder of `config.yaml`: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    places = (package / "configs", package.parent / "configs")
    for place in places:
        if (place / "config.yaml").is_file():
            return place
    raise UserError(f"no config.yaml in {places[0]} or {places[1]}; install the package ttt again")


def experiments() -> tuple[str, ...]:
    """Names for `+experiment=NAME`, sorted."""
    return choices("experiment")


def compose(overrides: Sequence[str]) -> DictConfig:
    """What `train OVERRIDES...` starts from. Raises UserError where Hydra refuses."""
    try:
        return _compose(overrides)
    except HydraException as error:
        raise explain(error, overrides) from error


def _compose(overrides: Sequence[str]) -> DictConfig:
    # A command that Hydra runs has its search path already, and a second start is refused.
    running = GlobalHydra.instance().is_initialized()
    start = hydra.initialize_config_dir
    with nullcontext() if running else start(str(config_dir()), version_base="1.3"):
        return hydra.compose("config", list(overrides))


def explain(error: HydraException, overrides: Sequence[str] = ()) -> UserError:
    """Hydra's complaint about a command line, with the closest names there are.

    overrides: those of the command line. Hydra stops at the first setting that does not exist; with
    them all of these are named, and whatever else is wrong.
    """
    unknown = dict.fromkeys(_unknown_settings(error, overrides))
    if unknown:
        rest = [text for text in overrides if _key(text) not in unknown]
        faults = [
            f"{key}: no such setting; correct its name" + _did_you_mean(key, _LEAVES)
            for key in unknown
        ]
        with suppress(HydraException, UserError):
            try:
                resolve(_compose(rest))
            except ConfigError as more:
                faults += more.faults
        return ConfigError(faults)
    message = str(error)
    if isinstance(error, MissingConfigException) and "/" in (file := error.missing_cfg_file or ""):
        group, name = file.split("/", 1)
        if group == "run":
            root = checkpoint_root()
            runs = sorted({"/".join(p.parts[-3:-1]) for p in Path(root).glob("*/*/[0-9]*")})
            there = ", ".join(difflib.get_close_matches(name, runs, n=3, cutoff=0.3) or runs[:3])
            return UserError(
                f"run={name}: no checkpoint with settings is at {root}/{name}; set TTT_CHECKPOINTS "
                f"to another root, or take one that is there ({there or 'none is'})"
            )
        options = choices(group)
        close = difflib.get_close_matches(name, options, n=3, cutoff=0.5) or options
        return UserError(
            f"{group}={name}: no such choice; take one that exists, such as {', '.join(close)}"
        )
    if match := re.match(
        r"Multiple values for ([\w/]+)\.|([\w/]+) appears more than once", message
    ):
        return UserError(
            f"{match[1] or match[2]} is chosen already; write {match[1] or match[2]}=NAME, "
            "without a +"
        )
    return UserError(f"{message}\n{error.__cause__}" if error.__cause__ else message)


def _key(override: str) -> str:
    return override.lstrip("+~").split("=")[0]


def _unknown_settings(error: HydraException, overrides: Sequence[str]) -> Iterator[str]:
    """Every key that Hydra cannot override: that of `error`, and what it meets without it."""
    while match := re.match(r"Could not override '([\w.]+)'\.\s+To append", str(error)):
        yield match[1]
        rest = [text for text in overrides if _key(text) != match[1]]
        if len(rest) == len(overrides):
            return
        overrides = rest
        try:
            _compose(overrides)
            return
        except HydraException as following:
            error = following


def choices(group: str) -> tuple[str, ...]:
    """Names of a config group, sorted: its files, and experiments that rules make."""
    made = experiment_rules.names(config_dir()) if group == "experiment" else ()
    return tuple(sorted({*_files(group), *made}))


def _files(group: str) -> list[str]:
    folder = config_dir() / group
    files = (path.relative_to(folder) for path in folder.rglob("*.yaml"))
    return sorted(path.with_suffix("").as_posix() for path in files)


def _experiment_list() -> str:
    """The files by name, then all that rules make, with what a name can hold in braces."""
    made = experiment_rules.short_list(config_dir())
    return "\n".join(f"  {name}" for name in [*_files("experiment"), *made])


# ---- rules that the files in configs/ follow -----------------------------------------


def narrowed_width(width: int, layers: int, suffix: int) -> int:
    """MLP width at which `layers + suffix` MLPs cost what `layers` did, rounded up to 128."""
    return math.ceil(width * layers / (layers + suffix) / 128) * 128


def mlp_width(policy: str, width: int, layers: int, suffix: int) -> int:
    """The MLP width of a model with prime MLPs, by its `width_policy`."""
    return width if policy == "full" else narrowed_width(width, layers, suffix)


def full_attention_rope_theta(base: float, seq_length: int) -> float:
    """The paper's rotary base for full attention: `base` up to 8K tokens, growing beyond."""
    growth = {8192: 1, 16384: 2, 32768: 4, 65536: 10}
    return base * next((by for length, by in growth.items() if seq_length <= length), 20)


def extension_batch_size(batch: int, seq_length: int, extended_length: int) -> int:
    """Sequences of `extended_length` tokens that hold twice the tokens of a pretraining batch."""
    return max(1, 2 * batch * seq_length // extended_length)


def head_dim(width: int, heads: int) -> int:
    """The width of each of `heads` heads that share `width`."""
    if heads < 1 or width % heads:
        raise ValueError(f"hidden_size={width} is no multiple of num_attention_heads={heads}")
    return width // heads


def share_of_steps(steps: int, share: float) -> int:
    """The whole steps nearest to a share of `steps`, and 1 at least."""
    return max(1, round(steps * share))


def checkpoint_root() -> str:
    """Where checkpoints lie unless the command line says otherwise."""
    return os.environ.get("TTT_CHECKPOINTS", "./checkpoints")


def experiments_root() -> str:
    """Where run records lie unless the command line says otherwise."""
    return os.environ.get("TTT_EXPERIMENTS", "./experiments")


def _cache_dir(name: str) -> str:
    """A folder of this user for what can be made again."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(root, "ttt", name)


for _resolver in (head_dim, mlp_width, full_attention_rope_theta, extension_batch_size):
    OmegaConf.register_new_resolver(f"ttt.{_resolver.__name__}", _resolver, replace=True)
OmegaConf.register_new_resolver(
    "ttt.prime_init", lambda post: "inherit" if post else "copy", replace=True
)
OmegaConf.register_new_resolver("ttt.share", share_of_steps, replace=True)
OmegaConf.register_new_resolver("ttt.floordiv", lambda number, by: number // by, replace=True)
OmegaConf.register_new_resolver("ttt.times", lambda number, by: number * by, replace=True)
OmegaConf.register_new_resolver("ttt.cache_dir", _cache_dir, replace=True)
OmegaConf.register_new_resolver("ttt.experiments", _experiment_list, replace=True)
OmegaConf.register_new_resolver("ttt.choices", lambda g: ", ".join(choices(g)), replace=True)
