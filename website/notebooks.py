"""Notebooks as pages: executed on made-up runs and on the autopsy's committed tables, with their figures."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from nbconvert import MarkdownExporter

from analysis import notebook
from tests.analysis import simulated
from website.places import REPOSITORY, on_site

TITLES = {
    "spikes": "Notebook: which term spiked",
    "arms": "Notebook: which arm is better",
    "published_recipe": "Notebook: the published recipe",
}
SHOWN = {
    re.escape("![svg]"): "![figure that the cell above has drawn]",
    r"<style scoped>.*?</style>\n": "",
    ' border="1" class="dataframe"': "",
    rf"{re.escape(tempfile.gettempdir())}/\w+/": "",
}
"""Pattern → what the page has instead: the site's own tables, names of figures, no folder of this machine."""
SOURCES = [f"analysis/notebooks/{name}.ipynb" for name in TITLES]
TABLES = REPOSITORY / "papers" / "results" / "autopsy"


def pages() -> dict[str, str | bytes]:
    """Place on the site → Markdown, or a figure's bytes. Takes about a minute."""
    made: dict[str, str | bytes] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"PYTHONPATH": str(REPOSITORY), "TWINRL_AUTOPSY": str(TABLES), "IPYTHONDIR": f"{folder}/ipython"}
        for path in _copies(Path(folder)):
            notebook.execute(path)
            made |= _page(path)
    return made


def _copies(folder: Path) -> Iterator[Path]:
    """The notebooks, each on what it is about: a run with three spikes, a study of three arms, the tables."""
    run = simulated.make_run(folder / "runs", spikes_at=(120, 200, 330))
    simulated.make_run(folder / "runs", seed=1)
    yield notebook.copy("spikes", run)
    yield notebook.copy("arms", simulated.make_study(folder / "study", seeds=6))
    yield Path(shutil.copy(notebook.SOURCES / "published_recipe.ipynb", folder))


def _page(path: Path) -> dict[str, str | bytes]:
    text, resources = MarkdownExporter().from_filename(str(path), resources={"unique_key": path.stem})
    for found, instead in SHOWN.items():
        text = re.sub(found, instead, text, flags=re.DOTALL)
    place = on_site(path.name)
    folder = place.rpartition("/")[0]
    figures = {f"{folder}/{name}": content for name, content in resources["outputs"].items()}
    return {place: f"---\ntitle: '{TITLES[path.stem]}'\n---\n{text}", **figures}
