"""Sampling: prompts from contexts and problems, and an engine that computes what prompts share once."""
