"""The run folder and what is written into it: lock and configuration, checkpoints, metrics, the console."""
