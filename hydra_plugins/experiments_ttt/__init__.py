"""Experiments without a file: Hydra finds those that `ttt.experiment_rules` makes from a name."""

from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from ttt import experiment_rules
from ttt.config import config_dir

_GROUP = "experiment"


class ExperimentSource(ConfigSource):
    """The config group `experiment`, made by rule; files of the same name come first."""

    @staticmethod
    def scheme() -> str:
        """Of the address `ttt://FOLDER`, where FOLDER holds the configs."""
        return "ttt"

    def load_config(self, config_path: str) -> ConfigResult:
        """The experiment at `experiment/NAME`, which `is_config` accepts."""
        content = OmegaConf.create(experiment_rules.make(Path(self.path), _name(config_path)) or {})
        address = f"{self.scheme()}://{self.path}"
        return ConfigResult(self.provider, address, content, {"package": "_global_"})

    def available(self) -> bool:
        """Whether the config folder is there."""
        return Path(self.path).is_dir()

    def is_group(self, config_path: str) -> bool:
        """Whether it is a folder of experiments, or the folder of all configs."""
        folder = config_path.strip("/")
        return folder == "" or bool(self._below(f"{folder}/"))

    def is_config(self, config_path: str) -> bool:
        """Whether a rule makes the experiment."""
        if not config_path.startswith(f"{_GROUP}/"):
            return False
        return experiment_rules.make(Path(self.path), _name(config_path)) is not None

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """Folders and experiments directly in a folder, sorted."""
        below = self._below(f"{config_path.strip('/')}/".lstrip("/"))
        groups = {name.split("/")[0] for name in below if "/" in name}
        configs = {name for name in below if "/" not in name}
        kinds = {ObjectType.GROUP: groups, ObjectType.CONFIG: configs, None: groups | configs}
        return sorted(kinds[results_filter])

    def _below(self, prefix: str) -> set[str]:
        """The rest of every path that begins so."""
        paths = (f"{_GROUP}/{name}" for name in experiment_rules.names(Path(self.path)))
        return {path.removeprefix(prefix) for path in paths if path.startswith(prefix)}


class ExperimentSearchPath(SearchPathPlugin):
    """Adds the rules to the commands of this package, and to no other Hydra application."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Behind the files, which come first where both have a name."""
        folder = str(config_dir())
        if any(element.path in (folder, f"file://{folder}") for element in search_path.get_path()):
            search_path.append("ttt", f"{ExperimentSource.scheme()}://{folder}")


def _name(config_path: str) -> str:
    """`experiment/NAME.yaml` -> NAME."""
    return config_path.strip("/").removeprefix(f"{_GROUP}/").removesuffix(".yaml")
