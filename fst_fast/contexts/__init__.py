"""Contexts: their scores, their Pareto front, their reflections. Text and numbers only, no torch."""
