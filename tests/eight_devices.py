"""One training step on eight pretended devices, in a process of its own; see test_sharding.py.

`python eight_devices.py METHOD` prints a JSON object: for each way to share the work, how far its
results lie from those of one device, and the collectives in the compiled text.
"""

import json
import os
import re
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from builders import GROUPED, HYBRID, MODEL, TRAINING, full_attention, random_tokens
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ttt.core import compiling
from ttt.core.batch import from_tokens
from ttt.infra import mesh
from ttt.infra.mesh import Layout
from ttt.model import loop
from ttt.model.transformer import MetaModel
from ttt.plan import parameters, sharding

# Before the first use of a device.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
CACHE = os.environ.get("TTT_TEST_CACHE", str(Path(tempfile.gettempdir()) / "ttt-test-cache"))
jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

META = replace(TRAINING, global_batch_size=16, accum_steps=2, eval_batch_size=7)
PLAIN = replace(META, train_mode="pretrain")
MUON = replace(PLAIN, optimizer_outer=replace(PLAIN.optimizer_outer, optimizer_type="muon"))
METHODS = {
    "fa": (full_attention(MODEL), PLAIN),
    "swa": (replace(MODEL, suffix_len=0, prime=False), PLAIN),
    "hybrid": (replace(HYBRID, **GROUPED, num_hidden_layers=4), PLAIN),
    "e2e": (MODEL, META),
    "muon": (replace(MODEL, suffix_len=0, prime=False), MUON),
}
# (backend.sharding, backend.state_parallel); the last of a method also evaluates.
WAYS = {
    "fa": {"replicated": ("replicated", 1), "both": ("fsdp", 2)},
    "swa": {"tensors": ("replicated", 2), "fsdp": ("fsdp", 1)},
    "hybrid": {"both": ("fsdp", 2)},
    "e2e": {"replicated": ("replicated", 1), "fsdp": ("fsdp", 1), "both": ("fsdp", 2)},
    "muon": {"both": ("fsdp", 2)},
}
_COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\(.*"
)
_GROUPS = re.compile(r"replica_groups=(mesh\S+ \{[^}]*\}|\[[\d,]+\]<=\[[\d,]+\](T\([\d,]+\))?)")


def collectives(text: str) -> list[dict]:
    """Every collective: its kind, its groups, and the places in the program that it came from."""
    found = []
    for line in text.splitlines():
        if match := _COLLECTIVE.search(line):
            groups = _GROUPS.search(line)
            name = re.search(r'op_name="([^"]*)"', line)
            found.append(
                {
                    "kind": match[2],
                    "groups": groups[1] if groups else line,
                    "from": name[1] if name else "",
                }
            )
    return found


def in_loops(text: str) -> int:
    """Collectives outside of the program's entry, where all that is in loops stands."""
    before, _, after = text.partition("\nENTRY ")
    rest = after.partition("\n}")[2]
    return len(collectives(before)) + len(collectives(rest))


def largest(a, b) -> float:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.max(np.abs(x - y))) for x, y in pairs)


def steps(model, training, layout, *, evaluate):
    """(state, metrics and scores after two steps, compiled step)."""
    state = loop.start_from(MetaModel(model, key=jax.random.key(0)), training)
    shardings = layout.shardings(state)
    layout.check(state)
    whole = NamedSharding(layout.mesh, PartitionSpec())
    tokens = random_tokens(2, 8, training.seq_length + 1, model=model)
    batch = from_tokens(tokens, model.bos_token_id)
    held_out = jax.tree.map(lambda x: x[0, :7], batch)  # fewer than devices: filled up
    state = layout.place(state)
    batch = mesh.shard_batch(layout.mesh, batch, batch_axis=1)
    compiled = (
        jax.jit(
            loop.make_train_step(training, layout),
            donate_argnums=0,
            out_shardings=(shardings, whole),
            compiler_options=compiling.options(),
        )
        .lower(state, batch)
        .compile()
    )
    metrics = []
    for _ in range(2):
        state, measured = compiled(state, batch)
        metrics.append(measured)
    assert jax.tree.all(
        jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, shardings)
    )
    scores = loop.Evaluator(training, layout)(state.model, held_out) if evaluate else None
    return jax.tree.map(np.asarray, (state, metrics, scores)), compiled


def compare(method: str) -> dict:
    model, training = METHODS[method]
    axes = ((1, 1), ("data", "state"), (AxisType.Auto,) * 2)
    one = jax.make_mesh(*axes, devices=jax.devices()[:1])
    (state, metrics, scores), _ = steps(model, training, Layout(one), evaluate=True)
    report = {}
    for way, (how, parallel) in WAYS[method].items():
        layout = Layout(mesh.device_mesh(parallel), sharding.rules(model, how))
        last = way == list(WAYS[method])[-1]
        (state2, metrics2, scores2), compiled = steps(model, training, layout, evaluate=last)
        memory = compiled.memory_analysis()
        text = compiled.as_text()
        held = jax.tree.leaves(layout.place(state.model))
        report[way] = {
            "parameters": largest(state.model, state2.model),
            "metrics": largest(metrics, metrics2),
            "scores": largest(scores, scores2) if last else None,
            "collectives": collectives(text),
            "in loops": in_loops(text),
            # Fast weights of the eight sequences of a microbatch in one array.
            "all fast weights": bool(re.search(r"f32\[8,2,16,(24|12)\]", text)),
            "arguments": memory.argument_size_in_bytes,
            "held": sum(x.addressable_shards[0].data.size for x in held),
            "predicted": sharding.DeviceSharding(8, how, parallel).held(
                parameters.parameters(model)
            ),
        }
    return report


if __name__ == "__main__":
    json.dump(compare(sys.argv[1]), sys.stdout)
