"""Floor 4: reading and writing with a model that goes on learning."""
