"""A warm start on four pretended devices, in a process of its own; see test_warm_start.py.

`python warm_on_four.py FOLDER OVERRIDE…` exits with an error that names every array of the state
that lay whole on one device.
"""

import sys
from pathlib import Path

import jax
from test_train import SMALL

from ttt.config import compose, resolve, to_dict
from ttt.core.tree import named_leaves
from ttt.infra import distributed
from ttt.infra.checkpoint import Checkpoints
from ttt.infra.step_folders import run_folder
from ttt.model import loop, published
from ttt.training import start, warm_start
from ttt.training.run import open_data


def settings(folder: str, *overrides: str):
    return resolve(
        compose(
            [
                *SMALL,
                f"deploy_paths.checkpoint={folder}/checkpoints",
                f"deploy_paths.experiments={folder}/experiments",
                "training.dummy_dataset=true",
                "training.eval_start_batches=1",
                "backend.fake_devices=4",
                "backend.sharding=fsdp",
                *overrides,
            ]
        )
    )


def main(folder: str, *overrides: str) -> None:
    plain = ["+experiment=tiny/pretrain/pretrain-tiny-fa", "model.suffix_len=0"]
    parent = settings(folder, *plain, "model.intermediate_size=48")
    distributed.start(parent.backend)
    fresh = loop.init_state(parent)
    saved = Checkpoints(run_folder(f"{folder}/checkpoints", "default", "pretrain-tiny-fa"))
    weights = published.to_stored(fresh.model)
    manifest = {"config": to_dict(parent), "data": {}}
    moments = {"count": fresh.step}
    saved.save(1, model_weights=weights, opt_state=moments, loader_state={}, manifest=manifest)
    saved.wait()
    del fresh, weights, moments
    child = settings(
        folder,
        "+experiment=tiny/pretrain/pretrain-tiny-e2e",
        "training.load_part=params",
        "training.resume_exp_name=pretrain-tiny-fa",
        *overrides,
    )
    layout = loop.lay_out(child)
    shapes = named_leaves(jax.eval_shape(lambda: loop.init_state(child).model))
    shapes |= named_leaves(jax.eval_shape(lambda: loop.init_state(parent).model))
    divided = {x.shape for name, x in shapes.items() if "data" in layout.spec(name, x.ndim)}
    whole: set[str] = set()

    def look(when: str) -> None:
        for array in jax.live_arrays():
            alone = array.addressable_shards[0].data.shape == array.shape
            if alone and array.shape in divided:
                whole.add(f"{array.shape} {when}")

    def watch(module, name: str) -> None:
        function = getattr(module, name)

        def watched(*arguments, **options):
            look(f"before {name}")
            result = function(*arguments, **options)
            look(f"after {name}")
            return result

        setattr(module, name, watched)

    watch(published, "take")
    watch(warm_start, "begin")
    watch(loop, "start_from")
    watch(start, "measure_parent")
    watch(start.Evaluator, "__call__")
    data = open_data(child)
    checkpoints = Checkpoints(Path(folder) / "own")
    begun = start.find_start(child, data.train, data.evaluation, checkpoints, None, layout)
    look("at the start")
    state, placed = jax.tree.leaves(begun.state), jax.tree.leaves(layout.shardings(begun.state))
    if not all(x.sharding.is_equivalent_to(s, x.ndim) for x, s in zip(state, placed, strict=True)):
        sys.exit("the state does not lie as the layout says")
    if whole:
        sys.exit("whole on one device: " + ", ".join(sorted(whole)))


if __name__ == "__main__":
    main(*sys.argv[1:])
