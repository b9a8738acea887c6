"""Pages of MLflow laid out beforehand: which runs, which charts, which axes. An address opens them in every browser.

MLflow keeps a *shared view* of an experiment's page in a tag of the experiment, whose name ends with the key in the
page's address. Its charts for series that no chart of the view draws are kept out: they would come in hundreds.
"""

import base64
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

TAG = "mlflow.sharedViewState."
COMPRESSED = "deflate;"
COLOUR_TAG = "mlflow.runColor"
TRAINING_PAGES = "workflowType=machine_learning"  # MLflow opens its pages for chat applications otherwise
BY_NAME = "tags.`mlflow.runName`"
NAME_COLUMN, NAME_PIXELS = "attributes.`Run Name`", 300
LINE = {
    "type": "LINE", "deleted": False, "isGenerated": False, "lineSmoothness": 0, "xAxisKey": "step",
    "xAxisScaleType": "linear", "yAxisKey": "metric", "yAxisExpressions": [], "selectedXAxisMetricKey": "", "range": {},
    "ignoreOutliers": False, "useGlobalXaxisKey": True, "useGlobalLineSmoothing": True, "displayPoints": False,
}  # fmt: skip


@dataclass(frozen=True)
class Chart:
    """Curves over steps, of every run of a view in its colour.

    Attributes:
        title: above it, where MLflow does not show the metrics' names. metrics: the first solid, then dashed, dotted.
        log: logarithmic vertical axis.
    """

    title: str
    metrics: tuple[str, ...]
    log: bool = False


@dataclass(frozen=True)
class Section:
    """Charts under one heading.

    Attributes:
        columns: charts beside one another. A wide one has room for the names of its runs below it.
        height: of a chart, in pixels. opened: whether it is unfolded at first.
    """

    title: str
    charts: Sequence[Chart]
    columns: int = 2
    height: int = 360
    opened: bool = True


@dataclass(frozen=True)
class View:
    """A page of an experiment.

    Attributes:
        runs: filter of the runs, as MLflow's search takes it.
        sections: charts, from the top; none for the table of runs.
        undrawn: metrics that get no chart.
        columns: of the table, e.g. ``tags.`arm```. order: what it is sorted by, rising. Sorted by their dates, runs
            would be folded up below their parents, which have no curves.
    """

    runs: str
    sections: Sequence[Section] = ()
    undrawn: Sequence[str] = ()
    columns: Sequence[str] = ()
    order: str = BY_NAME

    def state(self) -> dict[str, Any]:
        """What MLflow's page is made of."""
        sections = [
            {"uuid": f"s{k}", "name": s.title, "display": s.opened, "columns": s.columns, "cardHeight": s.height,
             "isReordered": True, "deleted": False, "isGenerated": False}
            for k, s in enumerate(self.sections)
        ]  # fmt: skip
        table = {
            "selectedColumns": list(self.columns), "columnOrder": [NAME_COLUMN, *self.columns],
            "columnWidths": {NAME_COLUMN: NAME_PIXELS},
        }  # fmt: skip
        return {
            "searchFilter": self.runs, "orderByKey": self.order, "orderByAsc": True, **table,
            "runsHiddenMode": "FIRST_20_RUNS",
            "compareRunSections": sections, "compareRunCharts": [*self._charts(), *self._deleted()],
            "isAccordionReordered": True, "hideEmptyCharts": True, "runListHidden": bool(sections),
            "autoRefreshEnabled": False,
            "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
        }  # fmt: skip

    def _charts(self) -> Iterator[dict[str, Any]]:
        for k, section in enumerate(self.sections):
            for i, chart in enumerate(section.charts):
                yield LINE | {
                    "uuid": f"c{k}.{i}", "metricSectionId": f"s{k}", "displayName": chart.title,
                    "metricKey": chart.metrics[0], "selectedMetricKeys": list(chart.metrics),
                    "scaleType": "log" if chart.log else "linear",
                }  # fmt: skip

    def _deleted(self) -> Iterator[dict[str, Any]]:
        """Charts that are there for MLflow not to make them by itself."""
        firsts = {chart.metrics[0] for section in self.sections for chart in section.charts}
        for k, name in enumerate(dict.fromkeys(name for name in self.undrawn if name not in firsts)):
            yield {"type": "LINE", "deleted": True, "isGenerated": True, "uuid": f"d{k}", "metricSectionId": "s0",
                   "metricKey": name}  # fmt: skip


def save(client: Any, experiment: str, key: str, view: View) -> None:
    """Keep a view in an experiment under ``key``, in place of the one before."""
    packed = base64.b64encode(zlib.compress(json.dumps(view.state()).encode(), 9)).decode()
    client.set_experiment_tag(experiment, f"{TAG}{key}", f"{COMPRESSED}{packed}")


def address(experiment: str, key: str, charts: bool = True) -> str:
    """What follows a server's address on the page of a view: its charts, or the table of its runs."""
    mode = "CHART" if charts else "TABLE"
    query = f"viewStateShareKey={quote(key, safe='')}&compareRunsMode={mode}&{TRAINING_PAGES}"
    return f"/#/experiments/{experiment}/runs?{query}"
