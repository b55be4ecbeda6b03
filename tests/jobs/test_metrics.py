"""What Prometheus is told, and what the dashboard shows of it."""

import importlib.util
import json
import re
import time
import urllib.request
from pathlib import Path

import pytest

from jobs import metrics
from tests.conftest import LONG_S
from tests.jobs.conftest import run

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "jobs" / "grafana.json").read_text(encoding="utf-8"))
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
SUFFIXES = {"Counter": ("_total",), "Gauge": ("",), "Histogram": ("_bucket", "_sum", "_count")}


def exported(name):
    """The names under which Prometheus finds a metric."""
    return {f"ray_{name}{suffix}" for suffix in SUFFIXES[metrics.METRICS[name].kind]}


def test_the_dashboard_shows_every_metric_and_no_other():
    shown = {name for query in QUERIES for name in re.findall(r"ray_vlsm_\w+", query)}
    known = set().union(*map(exported, metrics.METRICS))
    assert shown <= known
    assert [name for name in metrics.METRICS if not exported(name) & shown] == []


def test_the_dashboard_groups_by_tags_that_a_metric_has():
    for query in QUERIES:
        tags = {tag.strip() for found in re.findall(r"by \(([^)]*)\)", query) for tag in found.split(",")}
        for name in set(re.findall(r"ray_(vlsm_[a-z]+_[a-z]+)", query)):
            assert tags - {"le"} <= set(metrics.METRICS[name].tags), query


def test_the_dashboard_shows_cpus_gpus_and_the_object_store():
    names = ("ray_node_cpu_utilization", "ray_node_gpus_utilization", "ray_object_store_memory")
    assert all(any(name in query for query in QUERIES) for name in names)
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in DASHBOARD["panels"]]
    assert len(set(places)) == len(places) and len({panel["id"] for panel in DASHBOARD["panels"]}) == len(places)


def test_the_jobs_record_every_metric():
    code = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.glob("jobs/*.py") if path.name != "metrics.py")
    code = code.replace("vlsm_{name}_images", " ".join(f"vlsm_{name}_images" for name in ("planned", "done", "failed")))
    assert set(re.findall(r"\bvlsm_[a-z]+_[a-z]+", code)) - {"vlsm_a", "vlsm_b", "vlsm_c"} == set(metrics.METRICS)


def scrape(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        return answer.read().decode()


@pytest.mark.ray
@pytest.mark.skipif(
    importlib.util.find_spec("prometheus_client") is None, reason="needs ray[default], as clusters have"
)
def test_a_run_exports_its_metrics(ray_cluster, archive, tiny_checkpoint, tmp_path, capfd):
    import ray

    code, _, log = run(capfd, archive, tmp_path / "out", "--checkpoint", tiny_checkpoint)
    assert code == 0, log
    port = ray.nodes()[0]["MetricsExportPort"]
    wanted = set().union(*map(exported, metrics.METRICS))
    ends_s = time.monotonic() + LONG_S
    while True:  # each process exports its own counts, some seconds after it has counted
        text = scrape(port)
        missing = {name for name in wanted if f"\n{name}{{" not in text}
        written = re.findall(r'^ray_vlsm_written_images_total{.*Status="?ok.*} (\S+)', text, re.M | re.I)
        if (not missing and sum(map(float, written)) >= 6) or time.monotonic() > ends_s:
            break
        time.sleep(1)
    assert not missing
    assert sum(map(float, written)) >= 6
