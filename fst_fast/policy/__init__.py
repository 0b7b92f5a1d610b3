"""The policy: a Hugging Face model with tree attention and a fused head, its DeepSpeed engine, the frozen reference.

Import from the modules; nothing here pulls in torch by itself.
"""
