"""What a training step costs, and how it is fitted into memory: FLOPs, bytes, plan, hardware."""
