"""Tasks: where problems come from and how a response is judged. Nothing here imports torch: processes that verify must start fast."""
