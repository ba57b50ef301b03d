r"""How fast a checkpoint reads and writes here, as a share of what this machine can do at all.

Reading a token takes two operations per weight, writing one takes all weights out of memory once.
So the bounds are a matrix product of the same size and a pass over as many bytes, both measured in
turns with the model. Memory: what XLA gives to the program of reading, beside the parameters.

  uv run python tools/reading_speed.py external_phase1/import-smol135-fa-base
  uv run python tools/reading_speed.py external_phase1/import-smol135-fa-base --window 1024
"""

import json
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from ttt.config import checkpoint_root, of_stored
from ttt.core.tree import count
from ttt.entry import exit_codes
from ttt.inference.engine import Engine
from ttt.inference.sampling import Sampling
from ttt.infra import checkpoint, step_folders
from ttt.knobs import Config
from ttt.model.published import load_model


def main() -> None:
    """Measure and print a JSON object."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("run", help="FOLDER/NAME below the checkpoint root, or a path")
    parser.add_argument("--window", type=int, default=0, help="read with a sliding window")
    parser.add_argument("--dtype", default="", help="fp32 or bf16, of the weights while reading")
    parser.add_argument("--read", type=int, default=2048, help="tokens; default: 2048")
    parser.add_argument("--write", type=int, default=64, help="tokens, at most 64; default: 64")
    parser.add_argument("--turns", type=int, default=5, help="default: 5")
    args = parser.parse_args()
    with exit_codes():
        folder = checkpoint.find_folder(checkpoint_root(), args.run)
        config = of_stored(step_folders.read_manifest(folder)["config"])
        config = changed(config, args.window, args.dtype)
        model, _ = load_model(config.model, folder)
        print(json.dumps(measure(config, model, args.read, args.write, args.turns), indent=1))


def changed(config: Config, window: int, dtype: str) -> Config:
    """The configuration with another window or dtype."""
    model = config.model
    if window:
        chunk = min(512, window)
        how = {"seq_modeling_block": "SWA", "layer_types": (), "sliding_window_size": window}
        model = replace(model, **how, mini_batch_size=chunk, attention_block=0)
    if dtype:
        model = replace(model, compute_dtype=dtype)
    return replace(config, model=model)


def measure(config: Config, model, read: int, write: int, turns: int) -> dict[str, float]:
    """Median rates, shares and bytes."""
    weights, vocab = count(model), config.model.vocab_size
    engine = Engine(model, config.training, context=read + (turns + 2) * write + 64)
    ids = np.random.default_rng(0).integers(0, vocab, read).astype(np.int32)
    writing = engine.begin(engine.read(engine.start(1), [ids[:64]])[0])

    def written() -> None:
        nonlocal writing
        writing, new, _ = engine.advance(writing, write, Sampling(temperature=0.0))
        new.block_until_ready()

    work = {
        "read": lambda: engine.read(engine.start(1), [ids])[1],
        "product": product(config),
        "write": written,
        "bytes": all_bytes(4 * weights),
    }
    for call in work.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(turns):
        for name, call in work.items():
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    median = {name: float(np.median(values)) for name, values in seconds.items()}
    # A tied table is a matrix product once; as an embedding it is only looked up.
    operations = 2 * weights * read
    size = config.model.hidden_size, config.model.intermediate_size
    product_rate = 2 * ROWS * size[0] * size[1] * REPEATS / median["product"]
    memory = engine.memory(1)
    return {
        "parameters": weights,
        "read_tokens_per_second": read / median["read"],
        "read_share_of_matrix_product": operations / median["read"] / product_rate,
        "matrix_product_gflops": product_rate / 1e9,
        "write_tokens_per_second": write / median["write"],
        "write_share_of_reading_the_weights": median["bytes"] / (median["write"] / write),
        "memory_gigabytes_per_second": 4 * weights / median["bytes"] / 1e9,
        "reading_bytes_beside_parameters": memory or -1,
        "reading_bytes_to_float32_parameters": 1 + (memory or 0) / (4 * weights),
    }


ROWS, REPEATS = 512, 32


def product(config: Config) -> Callable[[], None]:
    """A matrix product of the model's own size, as often as makes a measurable time."""
    width, inner = config.model.hidden_size, config.model.intermediate_size
    x, w = jnp.ones((ROWS, width)), jnp.ones((width, inner))

    @jax.jit
    def run(x, w):
        def one(i, total):
            return total + jnp.sum(jnp.square((x + i) @ w))

        return jax.lax.fori_loop(0, REPEATS, one, jnp.zeros(()))

    return lambda: run(x, w).block_until_ready()


def all_bytes(size: int) -> Callable[[], None]:
    """A pass over as many bytes as the weights have, with every core: a matrix times a vector."""
    table = jnp.ones((size // 4 // 1024, 1024))
    row = jnp.ones(1024)
    run = jax.jit(lambda table, row: table @ row)
    return lambda: run(table, row).block_until_ready()


if __name__ == "__main__":
    main()
