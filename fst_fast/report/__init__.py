"""From run folders to one HTML page: curves on four axes, the four cells, the lineage of the contexts.

`load` reads a run folder, `curves` makes series and fits of it, `figures` draws them, `lineage` makes the tree of contexts, `html` puts
all of it on a page. Nothing here needs torch or the code that made the run: a folder copied from another machine is enough.
"""

from fst_fast.report.html import write_report

__all__ = ["write_report"]
