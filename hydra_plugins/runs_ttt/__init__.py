"""The config group `run`: `+run=FOLDER/NAME` takes the settings that a checkpoint was made with.

A trained or imported model can so be read, measured and timed without naming its experiment. The
checkpoints are looked for where `TTT_CHECKPOINTS` says, or in ./checkpoints.
"""

import json
from pathlib import Path
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from ttt.config import checkpoint_root, config_dir, stored_settings

_GROUP = "run"
_MANIFEST = Path("manifest") / "manifest.json"


class RunSource(ConfigSource):
    """The config group `run`, read from manifests below a checkpoint root."""

    @staticmethod
    def scheme() -> str:
        """Of the address `ttt-runs://ROOT`."""
        return "ttt-runs"

    def load_config(self, config_path: str) -> ConfigResult:
        """The settings of the run at `run/FOLDER/NAME`, which `is_config` accepts."""
        path = self._manifest(config_path)
        try:
            stored = json.loads(path.read_bytes())["config"] if path else {}
        except (OSError, ValueError, KeyError) as error:
            raise ConfigLoadError(f"{path}: {error}") from error
        content = OmegaConf.create(stored_settings(stored))
        address = f"{self.scheme()}://{self.path}"
        return ConfigResult(self.provider, address, content, {"package": "_global_"})

    def available(self) -> bool:
        """Always: a root without runs has none to offer."""
        return True

    def is_group(self, config_path: str) -> bool:
        """Whether it is the folder of all configs, of all runs, or an experiment folder."""
        parts = config_path.strip("/").split("/")
        if parts == [""] or parts == [_GROUP]:
            return True
        return len(parts) == 2 and parts[0] == _GROUP and (Path(self.path) / parts[1]).is_dir()

    def is_config(self, config_path: str) -> bool:
        """Whether a checkpoint with a manifest is there."""
        return self._manifest(config_path) is not None

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """Experiment folders, or the runs in one."""
        parts = config_path.strip("/").split("/")
        if parts == [""]:
            names = {ObjectType.GROUP: [_GROUP], None: [_GROUP]}.get(results_filter, [])
        elif parts == [_GROUP]:
            wanted = results_filter in (ObjectType.GROUP, None)
            names = [path.name for path in Path(self.path).glob("*/")] if wanted else []
        else:
            wanted = results_filter in (ObjectType.CONFIG, None)
            paths = (Path(self.path) / "/".join(parts[1:])).glob("*/") if wanted else ()
            names = [p.name for p in paths if self.is_config(f"{config_path}/{p.name}")]
        return sorted(names)

    def _manifest(self, config_path: str) -> Path | None:
        """Of the latest checkpoint; None: there is none."""
        parts = config_path.strip("/").removesuffix(".yaml").split("/")
        if len(parts) != 3 or parts[0] != _GROUP:
            return None
        folder = Path(self.path).expanduser().joinpath(*parts[1:])
        steps = [int(p.name) for p in folder.glob("*") if p.name.isdecimal()]
        path = folder / str(max(steps, default=-1)) / _MANIFEST
        return path if path.is_file() else None


class RunSearchPath(SearchPathPlugin):
    """Adds the runs to the commands of this package, and to no other Hydra application."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Behind the package's own files."""
        folder: Any = str(config_dir())
        if any(element.path in (folder, f"file://{folder}") for element in search_path.get_path()):
            search_path.append("ttt-runs", f"{RunSource.scheme()}://{checkpoint_root()}")
