"""Floor 6: tables and pictures from run records and a plan's manifest alone. No JAX."""
