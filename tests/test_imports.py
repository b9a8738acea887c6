"""Modules import each other in no circle, imports for types included; ``make imports`` holds the same of folders."""

from graphlib import TopologicalSorter

import grimp
import pytest


@pytest.mark.slow
def test_no_module_imports_itself_through_others() -> None:
    graph = grimp.build_graph("twinrl", "ablations", "analysis", cache_dir=None)
    imported = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert len(imported) > 200
    TopologicalSorter(imported).prepare()  # raises CycleError, which lists the modules
