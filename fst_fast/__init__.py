"""fst-fast: Fast-Slow Training of language models (arXiv 2605.12484)."""

__version__ = "0.1.0"
