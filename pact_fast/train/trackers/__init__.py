"""Experiment trackers that get the metrics of a run: TensorBoard, trackio, W&B, or a class of the user's (docs/tracking.md).

Their packages are imported when a run names them. A tracker that fails never ends a run.
"""
