"""Writes the plan in a thread while INPUT is still being listed, so that work on the first shards can begin."""

import threading
from collections.abc import Callable
from typing import Self

from vlsm.archive.archive import Archive
from vlsm.errors import StorageError
from vlsm.runs.plan import Plan, PlanWriter, cut_shards, shard_table


class Planner:
    """Writes the plan of a listed archive. It continues after plan files of an earlier or a simultaneous job.

    Args:
        output: the run's output folder.
        plan: the incomplete plan.
        shard_rows: most output rows of a shard.
        open_archive: opens the archive at its beginning (None), or after an image_uri and selector.
        save: called at the end with the complete plan and the archive that this planner has listed, or None.

    Attributes:
        is_resumed: whether plan files existed before.
    """

    def __init__(
        self,
        output: str,
        plan: Plan,
        shard_rows: int,
        open_archive: Callable[[tuple[str, str | None] | None], Archive],
        save: Callable[[Plan, Archive | None], None],
    ) -> None:
        self._writer = PlanWriter(output, plan.id, plan.kinds)
        self._shard_rows, self._open, self._save = shard_rows, open_archive, save
        self._changed = threading.Condition()
        self._stopped = self._done = self.is_resumed = False
        self._plan = plan
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped = True
        self._thread.join(timeout=10)  # a store that is down may block the thread for longer

    @property
    def num_images(self) -> int:
        """Number of images planned so far."""
        return self._writer.num_images

    def wait(self, num_shards: int) -> int:
        """Wait until more than num_shards shards are written or the plan is complete. Returns the number written.

        Raises:
            VlsmError: the listing failed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._done or self._writer.num_written > num_shards)
        self._raise()
        return self._writer.num_written

    def result(self) -> Plan:
        """Wait for the complete plan and return it; errors as for `wait`."""
        self._thread.join()
        self._raise()
        return self._plan

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            archive = None
            self._writer.resume()
            self.is_resumed = self._writer.num_written > 0
            while not self._writer.is_ended:
                self._notify()
                archive = self._open(self._writer.last)
                if self._list(archive):
                    self._writer.flush()
                if self._stopped:
                    return
            self._plan = self._writer.finish()
            self._save(self._plan, archive)
        except OSError as error:
            self._error = StorageError(f"the archive could not be listed to its end: {error}")
        except BaseException as error:  # the main thread raises it
            self._error = error
        finally:
            self._done = True
            self._notify()

    def _list(self, archive: Archive) -> bool:
        """Plan an archive to its end. Returns False if it is stopped, or must be listed again after the last file."""
        for shard in cut_shards(archive.rows, self._shard_rows):
            before = self._writer.num_written
            if self._stopped or not self._writer.add(shard_table(shard)):
                return False
            if self._writer.num_written > before:
                self._notify()
        return True

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()
