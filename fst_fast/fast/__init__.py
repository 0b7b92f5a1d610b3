"""The fast phase: evolving the contexts while the weights stand still."""
