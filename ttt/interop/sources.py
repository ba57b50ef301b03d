"""Foreign models on disk, opened for reading: Hugging Face folders and GGUF files. No JAX.

Nothing in them is executed, and files are read as they are.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 (safetensors asks NumPy for a dtype of the name bfloat16)
import numpy as np
import tokenizers
from gguf import GGUFReader, ReaderTensor, dequantize
from safetensors import SafetensorError, safe_open

from ttt.errors import UserError
from ttt.interop import families
from ttt.interop.families import Facts, Part
from ttt.interop.gguf_tokenizer import tokenizer_of

IGNORED = ("rotary_emb.inv_freq", "rope_freqs.weight")
"""Ends of names of tensors that follow from the config; nothing is taken from them."""
_INDEX = "model.safetensors.index.json"
_LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE")


class Source(ABC):
    """A foreign model. Tensors are read when they are needed, one at a time."""

    kind: str
    """`safetensors` or `gguf`."""
    path: Path
    facts: Facts
    half_split: bool
    """Whether the rotation pairs dimension i of a head with i + K/2; else 2i with 2i + 1."""

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Of all tensors."""

    @abstractmethod
    def describe(self, name: str) -> tuple[str, tuple[int, ...]]:
        """(dtype, shape as [out, in]) of a tensor, without reading it."""

    @abstractmethod
    def raw(self, name: str) -> np.ndarray:
        """A tensor as it is stored, for its hash."""

    @abstractmethod
    def read(self, name: str) -> np.ndarray:
        """A tensor as float numbers, [out, in]."""

    @abstractmethod
    def name_of(self, part: Part, layer: int | None) -> str:
        """The foreign program's name of a tensor."""

    @abstractmethod
    def tokenizer(self) -> tokenizers.Tokenizer:
        """Its tokenizer. Raises UserError if there is none that we can build."""

    @abstractmethod
    def files(self) -> dict[str, Path]:
        """Name -> path of every file that the model consists of."""

    @abstractmethod
    def licence(self) -> str:
        """What the model says of its licence; empty: nothing."""

    @cached_property
    def hashes(self) -> dict[str, dict[str, Any]]:
        """File name -> size and SHA-256."""
        return {
            name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
            for name, path in self.files().items()
        }


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_source(path: Path) -> Source:
    """A folder with config.json and *.safetensors, a GGUF file, or a folder that holds one.

    Raises UserError for what is missing, damaged, or of a family that is not supported.
    """
    path = path.expanduser().absolute()
    if path.suffix == ".gguf" and path.is_file():
        return GgufFile(path)
    if not path.is_dir():
        raise UserError(
            f"{path}: no Hugging Face folder and no .gguf file is there; name one that exists"
        )
    if (path / "config.json").is_file():
        return HuggingFaceFolder(path)
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return GgufFile(ggufs[0])
    what = f"{len(ggufs)} .gguf files" if ggufs else "neither config.json nor a .gguf file"
    raise UserError(f"{path} holds {what}; name one model")


# ---- Hugging Face folders ------------------------------------------------------------


class HuggingFaceFolder(Source):
    """`config.json`, `tokenizer.json`, and weights in one safetensors file or several."""

    kind = "safetensors"
    half_split = True

    def __init__(self, path: Path):
        """Read the config and the headers of the weights."""
        self.path = path
        self.config = _json(path / "config.json")
        self.facts = families.of_hf(self.config, str(path / "config.json"))
        self._files = self._weight_files()
        self._where: dict[str, str] = {}
        twice = []
        for name in self._files:
            with _safetensors(path / name) as file:
                for tensor in file.keys():  # noqa: SIM118 (it cannot be iterated)
                    if tensor in self._where:
                        twice.append(f"{tensor} ({self._where[tensor]}, {name})")
                    self._where[tensor] = name
        if twice:
            raise UserError(
                f"{path}: tensors that two files hold: {', '.join(twice)}; fetch the folder anew"
            )
        stated = self._index()
        astray = sorted(n for n, file in stated.items() if self._where.get(n) != file)
        if astray:
            raise UserError(
                f"{path / _INDEX} names tensors that are not in their files: {', '.join(astray)}; "
                "fetch the folder anew"
            )

    def _index(self) -> dict[str, str]:
        path = self.path / _INDEX
        return dict(_json(path).get("weight_map", {})) if path.is_file() else {}

    def _weight_files(self) -> list[str]:
        names = sorted(set(self._index().values()))
        if not names and (self.path / "model.safetensors").is_file():
            names = ["model.safetensors"]
        if not names:
            raise UserError(
                f"{self.path} has neither model.safetensors nor {_INDEX}; fetch the weights as "
                "safetensors (pickled .bin files are not read)"
            )
        if missing := [name for name in names if not (self.path / name).is_file()]:
            raise UserError(f"{self.path} lacks {', '.join(missing)}; complete the download")
        return names

    @property
    def names(self) -> tuple[str, ...]:  # noqa: D102 (the base says it)
        return tuple(self._where)

    def describe(self, name: str) -> tuple[str, tuple[int, ...]]:  # noqa: D102
        with _safetensors(self.path / self._where[name]) as file:
            part = file.get_slice(name)
            return part.get_dtype(), tuple(part.get_shape())

    def raw(self, name: str) -> np.ndarray:  # noqa: D102
        with _safetensors(self.path / self._where[name]) as file:
            return file.get_tensor(name)

    def read(self, name: str) -> np.ndarray:  # noqa: D102
        return self.raw(name)

    def name_of(self, part: Part, layer: int | None) -> str:  # noqa: D102
        return part.hf if layer is None else f"model.layers.{layer}.{part.hf}"

    def tokenizer(self) -> tokenizers.Tokenizer:  # noqa: D102
        path = self.path / "tokenizer.json"
        if not path.is_file():
            raise UserError(
                f"{self.path} has no tokenizer.json; fetch it from where the weights came from"
            )
        try:
            return tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path} is not a `tokenizers` JSON file: {error}") from error

    def files(self) -> dict[str, Path]:  # noqa: D102
        names = ["config.json", "tokenizer.json", *self._files]
        names += [_INDEX] if (self.path / _INDEX).is_file() else []
        return {name: self.path / name for name in names if (self.path / name).is_file()}

    def licence(self) -> str:  # noqa: D102
        readme = self.path / "README.md"
        if readme.is_file():
            head = readme.read_text(encoding="utf-8", errors="replace").split("\n---", 1)[0]
            for line in head.splitlines():
                if line.startswith("license:"):
                    return line.removeprefix("license:").strip()
        present = [name for name in _LICENCES if (self.path / name).is_file()]
        return f"see its file {present[0]}" if present else ""


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); fetch it anew") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; fetch it anew")
    return content


def _safetensors(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="np")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or truncated ({error}); fetch it anew") from error


# ---- GGUF ----------------------------------------------------------------------------


class GgufFile(Source):
    """llama.cpp's format: metadata, tokenizer and weights in one file, the weights in blocks."""

    kind = "gguf"

    def __init__(self, path: Path):
        """Read the metadata and the table of tensors."""
        self.path = path
        try:
            reader = GGUFReader(str(path))
            self.metadata = {name: field.contents() for name, field in reader.fields.items()}
        except Exception as error:  # the library raises what its parsing meets
            raise UserError(
                f"{path} is no GGUF file, damaged or truncated "
                f"({type(error).__name__}: {error}); fetch it anew"
            ) from error
        if "tokenizer.ggml.tokens" not in self.metadata:
            raise UserError(f"{path} has no tokenizer in its metadata; convert the model again")
        self._tensors: dict[str, ReaderTensor] = {t.name: t for t in reader.tensors}
        if len(self._tensors) < len(reader.tensors):
            raise UserError(f"{path} holds a tensor twice; convert the model again")
        end = max((t.data_offset + t.n_bytes for t in reader.tensors), default=0)
        if end > path.stat().st_size:
            raise UserError(
                f"{path} has {path.stat().st_size} bytes of {end}: it is truncated; fetch it anew"
            )
        stretch = self._tensors.get("rope_freqs.weight")
        self.facts = families.of_gguf(
            self.metadata,
            "output.weight" not in self._tensors,
            None if stretch is None else np.asarray(stretch.data),
            str(path),
        )
        # llama.cpp puts the rows of a Llama's queries and keys in pairs, and leaves the others.
        self.half_split = self.facts.family != "llama"

    @property
    def names(self) -> tuple[str, ...]:  # noqa: D102
        return tuple(self._tensors)

    def describe(self, name: str) -> tuple[str, tuple[int, ...]]:  # noqa: D102
        tensor = self._tensors[name]
        return tensor.tensor_type.name, tuple(int(n) for n in reversed(tensor.shape))

    def raw(self, name: str) -> np.ndarray:  # noqa: D102
        return np.asarray(self._tensors[name].data)

    def read(self, name: str) -> np.ndarray:  # noqa: D102
        tensor = self._tensors[name]
        return dequantize(tensor.data, tensor.tensor_type)

    def name_of(self, part: Part, layer: int | None) -> str:  # noqa: D102
        return part.gguf if layer is None else f"blk.{layer}.{part.gguf}"

    def tokenizer(self) -> tokenizers.Tokenizer:  # noqa: D102
        return tokenizer_of(self.metadata, str(self.path))

    def files(self) -> dict[str, Path]:  # noqa: D102
        return {self.path.name: self.path}

    def licence(self) -> str:  # noqa: D102
        return str(self.metadata.get("general.license", ""))
