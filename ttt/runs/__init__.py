"""Plans of several runs as data, and their execution (docs/ladder.md). No JAX."""
