"""Floor 5: what training and reading cost, in closed form and measured."""
