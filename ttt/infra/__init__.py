"""Disk and devices: checkpoints, run records, trackers, progress, start-up and meshes."""
