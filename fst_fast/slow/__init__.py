"""The slow phase: groups, advantages and one optimiser step over a forest of rollouts."""
