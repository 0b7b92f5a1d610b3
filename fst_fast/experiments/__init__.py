"""The paper's experiments on the mini world, with seeds and intervals: `fst experiment NAME --out DIR`, or `page.run(names, Runner(...))`.

    experiments.py  the experiments by name
    comparison.py, plasticity.py, continual.py, distillation.py, ablations.py, rivals.py
                    each experiment: which runs, which numbers, which claims
    runs.py         one training run: its name, its configuration, the run that it starts from
    runner.py       trains the runs that are not finished, side by side in processes of their own
    worker.py       what such a process does; preload.py: what it has imported when it starts
    methods.py      the runs that most experiments share, and their curves
    curves.py       a run folder as a curve on the axes
    statistics.py   bootstrap intervals, the ceiling of a pooled fit
    result.py       what an experiment returns
    figures.py      the pictures
    page.py         results.json, the tables, report.html

Nothing is imported here: preload.py sets the environment before anything below loads numpy.
"""
