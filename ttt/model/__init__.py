"""Floor 3: the network, test-time training, and the outer loop. Written for one sequence."""
