"""The segment and evaluate jobs with their tasks in this process, one after the other.

A test of what a job reads, decides and writes needs no cluster: on Ray, each run takes seconds to start its processes.
What Ray adds (processes, retries, deaths, placement) has tests of its own.
"""

import contextlib
from dataclasses import dataclass

import numpy as np

from jobs import evaluate, segment, segment_tasks
from jobs.segment_pipeline import finish_part
from jobs.segment_tasks import Task, fetch_shard, write_masks
from vlsm.evaluation.parts import missing_rows, open_source
from vlsm.segmentation.predictor import Predictor
from vlsm.segmentation.shard import ShardBatch, Unguarded


class _Session(contextlib.AbstractContextManager):
    """Takes the place of the session with Ray, which is never started."""

    milestones = {"start": 0.0}

    def start(self):
        pass

    def wait(self):
        pass

    def __exit__(self, *error):
        return None


class _Watch(Unguarded, contextlib.AbstractContextManager):
    """Takes the place of the watch over processes that may die."""

    def __exit__(self, *error):
        return None


@dataclass
class _Progress:
    """Takes the place of the progress line."""

    done: int
    failed: int

    def finish_shard(self, shard, num_images, failed):
        self.done += num_images
        self.failed += sum(failed.values())


class InProcess:
    """Puts the tasks of both jobs into this process.

    Attributes:
        num_read: the number of images that the segment job has read so far.
    """

    def __init__(self, monkeypatch):
        self.num_read = 0
        for job in (segment, evaluate):
            monkeypatch.setattr(job, "RaySession", _Session)
        monkeypatch.setattr(segment, "stream_shards", self._stream_shards)
        monkeypatch.setattr(evaluate, "score", _score)
        monkeypatch.setattr(Task, "watch", lambda *_: _Watch())
        monkeypatch.setattr(segment_tasks.metrics, "count", lambda *_, **__: None)

    def _stream_shards(self, session, run, waves, state, count_images, retry_failed=False, **_):
        squares = tuple(member.square for member in run.members)
        task = Task(run.settings, run.run_id, run.plan.id, squares, retry_failed, None)
        predictor, progress = None, _Progress(state.num_done, state.counts["failed"])
        for wave in waves:
            predictor = predictor or _start_models(run)
            for shard, exists in wave:
                table = fetch_shard({"shard": np.array([shard]), "exists": np.array([exists])}, task)
                batch = ShardBatch.unpack(table)
                self.num_read += len(batch.entries)
                texts = [task.settings.texts_of(prompts) for prompts in table["prompts"][0].as_py()]
                written = write_masks(predictor.predict(batch, texts, _Watch()).pack(), task)
                part = {name: values[0] for name, values in written.items()}
                finish_part(part, run, progress, count_images)


def _start_models(run):
    predictor = Predictor(run.settings, {number: member.files for number, member in enumerate(run.members)})
    predictor.check_probes()
    return predictor


def _score(evaluation):
    yield from (missing_rows(system, evaluation.settings) for system in evaluation.systems)
    sources = [open_source(system, evaluation.settings) for system in evaluation.systems]
    parts = [(number, shard) for number, source in enumerate(sources) for shard in range(source.num_parts)]
    yield evaluate._score_parts(sources, parts)
