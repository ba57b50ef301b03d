"""Floor 5: what a trained model can do, measured; one module per suite."""
