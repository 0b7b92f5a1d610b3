"""What a step will take, before it is started: memory and seconds per phase, from the configuration and the model's config.json alone.

    shapes      sizes and counts of a model                    workload    tokens of a step, over the processes
    memory      bytes of one process in every phase            machines    rates of GPUs and of a CPU core
    times       operations, bytes, launches -> seconds         advice      what fits, and what to change

Everything here is predicted; docs/planning.md compares it with what was measured. No module loads torch.
"""
