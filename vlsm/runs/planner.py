"""A listing turned into a plan in a thread: work on an archive's first shards begins before its end is known."""

import threading
from collections.abc import Callable
from typing import Self

from vlsm.archive.archive import Archive
from vlsm.errors import StorageError
from vlsm.runs.plan import ManifestWriter, Plan, cut_shards, shard_table


class Planner:
    """Writes the plan of a listed archive, going on behind what is written of it, by an earlier job or one beside it.

    Args:
        output: the run's output folder.
        plan: the incomplete one.
        shard_rows: output rows a shard holds at most.
        open_archive: the archive from its beginning, or from behind an image_uri and selector.
        save: takes the complete plan before the thread ends, and what was listed for it here, if anything.

    Attributes:
        is_resumed: whether some of it was written before.
    """

    def __init__(
        self,
        output: str,
        plan: Plan,
        shard_rows: int,
        open_archive: Callable[[tuple[str, str | None] | None], Archive],
        save: Callable[[Plan, Archive | None], None],
    ) -> None:
        self._writer = ManifestWriter(output, plan.id, plan.kinds)
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
        self._thread.join(timeout=10)  # a store that is away may hold it for longer

    @property
    def num_images(self) -> int:
        """Planned so far."""
        return self._writer.num_images

    def wait(self, num_shards: int) -> int:
        """How many shards are written, as soon as there are more than so many, or there will be no more.

        Raises:
            VlsmError: the listing failed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._done or self._writer.num_written > num_shards)
        self._raise()
        return self._writer.num_written

    def result(self) -> Plan:
        """The complete plan, once there is one; errors as for `wait`."""
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
                self._tell()
                archive = self._open(self._writer.last)
                if self._list(archive):
                    self._writer.flush()
                if self._stopped:
                    return
            self._plan = self._writer.finish()
            self._save(self._plan, archive)
        except OSError as error:
            self._error = StorageError(f"the archive could not be planned to its end: {error}")
        except BaseException as error:  # whatever it is, the main thread is to know
            self._error = error
        finally:
            self._done = True
            self._tell()

    def _list(self, archive: Archive) -> bool:
        """Plan an archive to its end; False where it is to be listed again from behind the last file."""
        for shard in cut_shards(archive.rows, self._shard_rows):
            before = self._writer.num_written
            if self._stopped or not self._writer.add(shard_table(shard)):
                return False
            if self._writer.num_written > before:
                self._tell()
        return True

    def _tell(self) -> None:
        with self._changed:
            self._changed.notify_all()
