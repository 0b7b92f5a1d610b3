"""From run folders to one HTML page: curves on the four honest axes, the four cells, what the contexts became.

`load` reads a run folder, `curves` makes series and fits of it, `figures` draws them, `lineage` makes the tree of contexts, `html` puts
all of it on a page. Nothing here needs torch or the code that made the run: a folder copied from another machine is enough.
"""

from fst_fast.report.html import write_report

__all__ = ["write_report"]
