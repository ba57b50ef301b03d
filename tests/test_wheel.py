"""What an installation from the wheel holds."""

import configparser
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The unpacked wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def files(folder: Path) -> set[str]:
    """Paths of a folder's files; without what Python and editors leave."""
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_wheel_holds_package_configs_plugins_and_nothing_else(wheel):
    (info,) = wheel.glob("ttt-*.dist-info")
    assert files(wheel) == (
        {f"ttt/{name}" for name in files(ROOT / "ttt")}
        | {f"ttt/configs/{name}" for name in files(ROOT / "configs")}
        | {f"hydra_plugins/{name}" for name in files(ROOT / "hydra_plugins")}
        | {f"{info.name}/{name}" for name in files(info)}
    )


def test_wheel_carries_the_license(wheel):
    (license_file,) = wheel.glob("*.dist-info/licenses/LICENSE")
    assert license_file.read_text() == (ROOT / "LICENSE").read_text()
    assert "Apache License" in license_file.read_text()


def test_commands_point_at_modules_of_the_wheel(wheel):
    (entries,) = wheel.glob("*.dist-info/entry_points.txt")
    parser = configparser.ConfigParser()
    parser.read(entries)
    commands = dict(parser["console_scripts"])
    assert "train" in commands
    for target in commands.values():
        module, function = target.split(":")
        assert function in (wheel / f"{module.replace('.', '/')}.py").read_text()


@pytest.mark.parametrize(
    "name", ["tiny/pretrain/pretrain-tiny-e2e", "125m/adapt/adapt-125m-e2e-8K-from-fa-5pct"]
)
def test_wheel_composes_an_experiment_far_from_the_clone(wheel, tmp_path, name):
    code = (
        "import ttt.config\n"
        f"composed = ttt.config.compose(['+experiment={name}'])\n"
        "ttt.config.resolve(composed)\n"
        "import hydra_plugins.experiments_ttt as plugin\n"
        "print(ttt.config.__file__, ttt.config.config_dir(), *plugin.__path__, sep='\\n')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(wheel)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert all(Path(line).is_relative_to(wheel) for line in done.stdout.split())
