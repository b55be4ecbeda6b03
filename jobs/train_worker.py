"""A worker of the train job. Ray Train calls `train_worker` in each worker, and again after the death of one."""

import contextlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

import vlsm
from jobs.clock import TrainClock
from jobs.train_artifacts import copy_artifacts
from jobs.train_feed import Feed, plan_loaders
from jobs.train_group import FIRST_STEP, Work
from vlsm import storage
from vlsm.errors import ResultError, VlsmError
from vlsm.events import event
from vlsm.runs.record import SUMMARY_NAME
from vlsm.temporary import PrivateFolder, use_folder
from vlsm.training.checks import check_batch_norms
from vlsm.training.feature_cache import FeatureCache
from vlsm.training.history import Row, describe_epoch, summarize
from vlsm.training.learner import Learner, NotFiniteError, Score
from vlsm.training.memory import explain_out_of_memory
from vlsm.training.parallel import describe_batch_norms, gather, is_sharded
from vlsm.training.run import build_learning_model, default_prompt, read_examples, read_negatives
from vlsm.training.sampling import ExampleOrder, MicroBatch
from vlsm.training.settings import TrainSettings
from vlsm.training.staging import stage
from vlsm.training.state import (
    ADVICE,
    CHECKPOINT_NAME,
    LAST_NAME,
    State,
    copy_best,
    pack_state,
    put_progress,
    read_state,
    write_metrics,
)
from vlsm.training.trackers import open_trackers
from vlsm.words import count


def train_worker(work: Work) -> None:
    """Train to the end, or raise. An error that another try cannot fix is put on the board and ends the run."""
    if ray.get(work.board.failure.remote()):
        return
    work.board.reach.remote("workers", time.time())
    torch.set_num_threads(work.size.num_threads)
    try:
        with features_folder(work) as folder:
            Worker(work, folder).run()
    except Exception as error:
        if message := _explain(error, work.settings):
            ray.get(work.board.fail.remote(message))
        raise


@contextlib.contextmanager
def features_folder(work: Work) -> Iterator[Path | None]:
    """Return a context with the folder of the feature cache, which the first worker of each node creates, or None.

    It is removed at the end, also after an error. If the worker is killed, the driver or the next run removes it.
    """
    if not work.settings.run.feature_cache_bytes:
        yield None
        return
    context, node = ray.train.get_context(), ray.get_runtime_context().get_node_id()
    with contextlib.ExitStack() as stack:
        is_first = context.get_local_rank() == 0
        created = [stack.enter_context(PrivateFolder(work.features_kind))] if is_first else []
        folders = dict(gather([(node, folder) for folder in created]))
        yield created[0] if created else stack.enter_context(use_folder(folders[node]))


def _explain(error: BaseException, settings: TrainSettings) -> str | None:
    """Return the message of an error that ends the run, or None if another try may succeed, as after a death."""
    chain: BaseException | None = error
    while chain is not None:
        if message := explain_out_of_memory(chain, settings):
            return message
        if isinstance(chain, VlsmError):
            return str(chain)
        chain = getattr(chain, "cause", None) or chain.__cause__ or chain.__context__
    # Ray and torch's collectives raise these errors when other processes die; all other errors would come again
    is_temporary = isinstance(error, ray.exceptions.RayError | RuntimeError | ConnectionError | TimeoutError)
    return None if is_temporary else f"{type(error).__name__}: {error}"


class _Warnings(logging.Handler):
    """Passes the warnings of the library to the job's log."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        self._say(record.getMessage())


class Worker:
    """The part of a run that one worker executes."""

    def __init__(self, work: Work, features_folder: Path | None) -> None:
        context = ray.train.get_context()
        self.settings, self.output, self.board = work.settings, work.settings.output, work.board
        self.lease = work.lease
        self.rank, self.num_workers = context.get_world_rank(), context.get_world_size()
        self.records = read_examples(self.output)
        are_negative = read_negatives(self.output) if self.settings.data.negatives is not None else None
        self.order = ExampleOrder(self.records, self.settings, self.rank, self.num_workers, are_negative)
        self.device = ray.train.torch.get_device()
        if self.rank == 0:  # in this process the log of warnings leads only to a file of Ray
            logging.getLogger("vlsm").addHandler(_Warnings(self.say))
        model = build_learning_model(self.settings)
        check_batch_norms(model, self.order)  # here again: only now is the number of workers certain
        if warning := describe_batch_norms(model, self.settings, self.num_workers):
            self.say(warning)
        data = self.settings.data.allowing(self.settings.run.allow)
        loaders = plan_loaders(self.num_workers, work.size.cpus)
        self.feed = Feed(self.records, data, model.image_spec.square, work.decoded, *loaders)
        max_bytes, num_sharing = self.settings.run.feature_cache_bytes, context.get_local_world_size()
        self.features = FeatureCache(features_folder, max_bytes, num_sharing) if features_folder else None
        self.learner = Learner(model, self.settings, self.order.num_steps, self.device, self.features)
        self.state = read_state(self.output)
        if self.state.weights is not None:
            self._restore(self.state.weights)
            self.say(f"goes on at epoch {self.state.epoch + 1}, step {self.state.step + 1}")
        self.state.weights = self.state.optimizer = None
        self.trackers = open_trackers(self.settings, work.run_id, self.say) if self.rank == 0 else []
        self.board.reach.remote("model", time.time())
        self.train_scores: list[Score] = []
        self.val_scores: list[Score] = []
        counts = Counter(record.split for record in self.records)
        self.clock = TrainClock(self.settings.optim.epochs, self.order.num_steps, counts["train"], counts["val"])
        self.loss = float("nan")  # of the last batch
        self.saver = ThreadPoolExecutor(1)  # writing a large model takes seconds, and much longer to a remote store
        self.saving: Future[None] | None = None

    def _restore(self, weights: dict[str, torch.Tensor]) -> None:
        # a collective of several workers raises a RuntimeError also if another worker dies
        errors: tuple[type[Exception], ...] = (LookupError, ValueError, TypeError, AttributeError)
        errors += (RuntimeError,) if self.num_workers == 1 else ()
        try:
            self.learner.restore(weights, self.state.optimizer or {})
        except errors as error:
            reason, uri = " ".join(str(error).split())[:200], storage.join(self.output, LAST_NAME)
            raise ResultError(f"{uri} does not fit the model: {reason!r}; {ADVICE}") from error

    def run(self) -> None:
        """Train from the current state of the run to its end, test the best checkpoint, and write the summary."""
        stream = stage(self.feed.stream(self._rest()), self.device)
        try:
            while not self._is_over():
                batch, images, masks = next(stream)
                if batch.split == "train":
                    self._learn(batch, images, masks)
                else:
                    self._validate(batch, images, masks)
        finally:
            self.saver.shutdown()  # also after an error: first the last good state is written
        stream.close()  # type: ignore[attr-defined]
        self.wait_until_saved()
        self._finish(self._test())

    def check_lease(self) -> None:
        """Raise a LeaseError if another job has taken over the run: this worker must not write to its files."""
        if self.lease is not None:
            self.lease.check()

    def say(self, line: str, extra: dict[str, Any] | None = None) -> None:
        """Add a line, with its event, to the job's log; only the first worker does so."""
        if self.rank == 0:
            self.board.say.remote(line, extra)

    def _rest(self) -> Iterator[MicroBatch]:
        """Yield the micro-batches from the current state to the end of the run."""
        first = self.state.epoch
        for epoch in range(first, self.settings.optim.epochs):
            yield from self.order.train(epoch, self.state.step if epoch == first else 0)
            yield from self.order.evaluate("val", epoch)

    def _is_over(self) -> bool:
        optim, epochs = self.settings.optim, self.state.epoch
        if epochs >= optim.epochs or optim.early_stop is None or epochs < optim.min_epochs:
            return epochs >= optim.epochs
        return self.state.history.stale_epochs(optim.monitor, optim.min_delta) >= optim.early_stop

    def _learn(self, batch: MicroBatch, images: torch.Tensor, masks: torch.Tensor) -> None:
        try:
            scores = self.learner.train(batch, images, masks, self.state.history)
        except NotFiniteError as error:
            record = self.records[error.example]
            raise VlsmError(
                f"dataset {record.dataset}, {record.where}: {error}; the last good state is in {self.output}; "
                "try a lower optim.lr, a longer optim.warmup_epochs, or optim.precision=fp32 in another OUTPUT"
            ) from error
        self.loss = sum(score.loss for score in scores) / len(scores) if scores else self.loss
        self._tick(batch, batch.step, self.loss)
        if not batch.ends_step:
            return
        self.board.reach.remote(FIRST_STEP, time.time())
        self.train_scores += scores
        self.state.step, self.state.steps = batch.step + 1, self.state.steps + 1
        if self.rank == 0:
            progress = {"epoch": batch.epoch + 1, "epochs": self.settings.optim.epochs}
            self.board.note.remote(progress | {"step": self.state.step, "steps": self.order.num_steps})
        interval = self.settings.run.checkpoint_steps
        if interval and self.state.step % interval == 0 and self.state.step < self.order.num_steps:
            self._save(self._all_train_scores())

    def _validate(self, batch: MicroBatch, images: torch.Tensor, masks: torch.Tensor) -> None:
        if not self.val_scores:
            self.learner.end_training()
        self.val_scores += self.learner.evaluate(batch, images, masks)
        self._tick(batch, self.order.num_steps)
        if batch.ends_step:
            self.end_epoch(batch.epoch)

    def _tick(self, batch: MicroBatch, step: int, loss: float | None = None) -> None:
        """Count the examples of a micro-batch, which all workers have at the same time; log a line every 10 s."""
        self.clock.count(batch.split, sum(batch.weights) * self.num_workers)
        if (line := self.clock.line(batch.epoch, step, loss)) is not None:
            self.say(line[0], event("progress", **line[1]))

    def end_epoch(self, epoch: int) -> None:
        """End an epoch in all workers together: compute its metrics, save the state, and log a line."""
        state, optim = self.state, self.settings.optim
        train, val = self._all_train_scores(), self._all_once(self.val_scores, "val")
        common = {"epoch": epoch + 1, "step": state.steps, "lr": self.learner.lr, **self.clock.end_epoch()}
        rows = self._rows("train", train, common) + self._rows("val", val, common)
        state.history.rows += rows
        is_best = state.history.best_epoch(optim.monitor) == epoch + 1
        state.epoch, state.step, state.scores = epoch + 1, 0, []
        self.train_scores, self.val_scores = [], []
        self._save([], is_best)
        if self.rank == 0:
            self.check_lease()
            write_metrics(self.output, state.history)
            for tracker in self.trackers:
                tracker.track(rows)
        ended = event("epoch", epoch=epoch + 1, epochs=optim.epochs, is_best=is_best, metrics=rows)
        self.say(describe_epoch(rows, optim.epochs, is_best), ended)

    def _save(self, scores: list[tuple[int, float, float]], is_best: bool = False) -> None:
        weights, optimizer = self.learner.state()
        if self.rank:
            return
        self.wait_until_saved()
        state, best = self.state, None
        packed = pack_state(State(state.epoch, state.step, state.steps, scores, state.history, weights, optimizer))
        if is_best:
            whole = weights if is_sharded(self.learner.model) else None
            best = copy_best(self.learner.model, default_prompt(self.records, self.settings), whole)
        self.saving = self.saver.submit(put_progress, self.output, packed, best, self.check_lease)

    def wait_until_saved(self) -> None:
        """Wait until the save in the background has ended, and raise its error if it failed."""
        if self.saving is not None:
            self.saving.result()
            self.saving = None

    def _all_train_scores(self) -> list[tuple[int, float, float]]:
        """Return the train scores of all workers in this epoch."""
        new_scores = gather([(score.example, score.loss, score.dice) for score in self.train_scores])
        return self.state.scores + new_scores

    def _all_once(self, scores: Sequence[Score], split: str) -> list[tuple[int, float, float]]:
        """Return the scores of all workers after a check that each example of the split has exactly one.

        Raises:
            VlsmError: an example has no score or several.
        """
        all_scores = gather([(score.example, score.loss, score.dice) for score in scores])
        counts = Counter(score[0] for score in all_scores)
        expected = Counter(number for number, record in enumerate(self.records) if record.split == split)
        if counts != expected:
            raise VlsmError(
                f"{split} has {counts.total()} scores of {len(counts)} examples; "
                f"it must have one score of each of its {expected.total()} examples"
            )
        return sorted(all_scores)

    def _rows(self, split: str, scores: list[tuple[int, float, float]], common: dict[str, Any]) -> list[Row]:
        named = [(self.records[example].dataset, loss, dice) for example, loss, dice in scores]
        datasets = [*self.settings.datasets, *self.settings.external]
        named_in_records = [record.dataset for record in self.records]  # a manifest may name other datasets
        names = list(dict.fromkeys([*datasets, *named_in_records]))
        return summarize(named, names, {"split": split, **common}, self.settings.external)

    def _test(self) -> list[Row]:
        """Return the test metrics of the best checkpoint, loaded in the same way as jobs.segment does it."""
        if not any(record.split == "test" for record in self.records):
            return []
        optim = self.settings.optim
        best = self.state.history.best_epoch(optim.monitor)
        num_tests = sum(record.split == "test" for record in self.records)
        self.say(f"testing the checkpoint of epoch {best} on {count(num_tests, 'example')}")
        gather([])  # wait until the first worker has written the checkpoint
        model = vlsm.load_checkpoint(storage.join(self.output, CHECKPOINT_NAME)).model
        tester = Learner(model, self.settings, self.order.num_steps, self.device)
        scores: list[Score] = []
        for batch, images, masks in stage(self.feed.stream(self.order.evaluate("test", best)), self.device):
            scores += tester.evaluate(batch, images, masks)
        common = {"epoch": best, "step": self.state.steps, "lr": self.learner.lr, **self.clock.end_epoch()}
        return self._rows("test", self._all_once(scores, "test"), common)

    def _finish(self, rows: list[Row]) -> None:
        state, monitor = self.state, self.settings.optim.monitor
        best = state.history.best_epoch(monitor)
        if self.features is not None:
            gather([])  # wait until no worker reads them any more: the first one of each node removes them
        if self.rank:
            return
        self.check_lease()
        state.history.rows += rows
        write_metrics(self.output, state.history)
        for tracker in self.trackers:
            if rows:
                tracker.track(rows)
        shown = [row for row in state.history.rows if row.epoch == best and row.split != "train"]
        summary = {
            "checkpoint": storage.join(self.output, CHECKPOINT_NAME),
            "prompt": default_prompt(self.records, self.settings),
            "epochs": state.epoch,
            "best_epoch": best,
            "steps": state.steps,
            "dice": {f"{row.split} {row.dataset}": round(row.dice, 4) for row in shown},
            "loss": {f"{row.split} {row.dataset}": round(row.loss, 4) for row in shown},
        }
        storage.write_bytes(storage.join(self.output, SUMMARY_NAME), (json.dumps(summary) + "\n").encode())
        self._finish_trackers()  # after the summary: the run is complete, whatever becomes of the trackers

    def _finish_trackers(self) -> None:
        if not self.trackers:
            return
        with contextlib.ExitStack() as stack:
            folder = None
            if self.settings.run.log_artifacts != "none":
                try:
                    artifacts = copy_artifacts(self.output, self.settings.run.log_artifacts)
                    folder = str(stack.enter_context(artifacts))
                except Exception as error:  # a full temporary disk, an image that cannot be read again
                    self.say(f"the trackers get no files: {type(error).__name__}: {error}")
            for tracker in self.trackers:
                tracker.finish(folder)
