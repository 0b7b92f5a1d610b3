"""The slow phase: policy-gradient steps on the weights while the contexts are frozen. Start with slow_phase.py."""
