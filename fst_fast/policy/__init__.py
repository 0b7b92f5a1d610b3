"""The policy: a Hugging Face model with tree attention and a fused head, its DeepSpeed engine, and the frozen reference.

Import from the submodules; importing this package does not load torch.
"""
