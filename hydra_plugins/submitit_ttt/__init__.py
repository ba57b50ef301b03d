"""Launchers for Hydra sweeps: `submitit_slurm_ttt` and `submitit_local_ttt`.

Those of hydra-submitit-launcher with the defaults that a JAX run wants; every field of theirs can
be set as `hydra.launcher.FIELD=VALUE`. Logs go to `.submitit` in the sweep's folder, under
`deploy_paths.experiments`.
"""

from dataclasses import dataclass, field

from hydra.core.config_store import ConfigStore
from hydra_plugins.hydra_submitit_launcher.config import LocalQueueConf, SlurmQueueConf


@dataclass
class SlurmTTT(SlurmQueueConf):
    """A Slurm job of one task per node: JAX drives all of a node's devices from one process.

    At its time limit, or preempted, it saves and goes back into the queue.
    """

    _target_: str = "hydra_plugins.submitit_ttt.launcher.SlurmTTTLauncher"
    timeout_min: int = 24 * 60
    max_num_timeout: int = 1000  # submitit's own 0 would end the run at its first time limit
    tasks_per_node: int = 1
    stderr_to_stdout: bool = True
    # A process that fails would leave the others waiting for it until the time limit.
    srun_args: list[str] = field(default_factory=lambda: ["--kill-on-bad-exit=1"])


@dataclass
class LocalTTT(LocalQueueConf):
    """A background process on this machine."""

    _target_: str = "hydra_plugins.submitit_ttt.launcher.LocalTTTLauncher"
    timeout_min: int = 24 * 60
    stderr_to_stdout: bool = True


for _name, _node in {"submitit_slurm_ttt": SlurmTTT, "submitit_local_ttt": LocalTTT}.items():
    ConfigStore.instance().store(group="hydra/launcher", name=_name, node=_node, provider="ttt")
