"""A real Ray cluster of two nodes on this machine, one of which is killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from visprune.errors import BundleError, UsageError
from visprune.evaluation import evaluate, read_questions
from visprune.evaluation.answering import AnswerJob, AnswerSettings, Candidate
from visprune.evaluation.cluster import on_ray
from visprune.evaluation.workers import Workers

cluster_utils = pytest.importorskip("ray.cluster_utils")

SETTINGS = AnswerSettings(8)
ROOM = {"object_store_memory": 80_000_000}


@pytest.fixture
def cluster(monkeypatch):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    found = cluster_utils.Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **ROOM}
    )
    found.machines = [found.add_node(num_cpus=1, **ROOM) for _ in range(2)]
    monkeypatch.setenv("RAY_ADDRESS", found.address)
    yield found
    found.shutdown()


def test_ray_answers_alike_also_when_a_machine_dies(cluster, demo_bundle, demo_data, tmp_path):
    questions = read_questions(demo_data)
    alone = evaluate([demo_bundle], questions, settings=SETTINGS, workers=Workers(1))
    died = []

    def kill(_, done, total):
        if done == 10:
            cluster.remove_node(cluster.machines.pop(), allow_graceful=False)
            died.append(done)

    elsewhere = AnswerJob(Candidate(Path("/nowhere/bundle")), "", "", SETTINGS)
    with (
        pytest.raises(BundleError, match=r"On the machine .* of the cluster: .*is not a bundle"),
        on_ray([elsewhere]),
    ):
        pass
    wide = AnswerSettings(8, threads=64)
    with pytest.raises(UsageError, match="64 processors"):
        evaluate([demo_bundle], questions, settings=wide, workers=Workers(ray=True))
    on_cluster = evaluate(
        [demo_bundle], questions, settings=SETTINGS, workers=Workers(ray=True), progress=kill
    )
    assert died == [10]
    assert on_cluster == alone


def test_no_cluster(demo_bundle, demo_data, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(UsageError, match="No Ray cluster"):
        evaluate([demo_bundle], demo_data, workers=Workers(ray=True))
