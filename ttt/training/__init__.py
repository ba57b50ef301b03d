"""How a network is trained: where it starts, its step, the light modes, warm starts."""
