"""Tools: Python functions with type hints that the policy may call between its turns (docs/environments.md).

functions.py   a function as a tool: its JSON schema, its arguments checked, its result as text
calls.py       the tool calls in a response, in the syntax of the model's chat template
builtin.py     the tools that a task may name: run_code, search, file.py:function
"""
