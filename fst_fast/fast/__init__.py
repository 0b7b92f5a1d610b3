"""The fast phase: contexts evolve while the weights are frozen. Start with fast_phase.py."""
