"""The conclusions from the deaths of processes."""

import logging
from types import SimpleNamespace

from jobs import crash_watch
from jobs.crash_watch import CrashBoard, EarlierAttempts, Watch
from jobs.segment_actor import BoardHandler


def test_an_image_under_way_at_two_deaths_is_blamed_and_other_deaths_are_counted():
    board = CrashBoard()
    assert board.begin("fetch", 7) == EarlierAttempts(num_deaths=0, num_unexplained=0, blamed=[])
    assert board.begin("fetch", 7) == (1, 1, [])  # the first try names no images
    board.enter("fetch", 7, 3)
    assert board.begin("fetch", 7) == (2, 1, [])
    board.enter("fetch", 7, 2)
    board.enter("fetch", 7, None)
    board.enter("fetch", 7, 3)
    assert board.begin("fetch", 7) == (3, 1, [3])
    for number in range(4, 8):
        assert board.begin("fetch", 7) == (number, number - 2, [3])
    board.end("fetch", 7, None)
    assert board.begin("fetch", 7) == (0, 0, [])


def test_the_last_error_is_one_that_was_not_got_over():
    board = CrashBoard()
    board.end("fetch", 1, "OSError: away")
    board.end("write", 2, "OSError: full")
    assert board.last_error() == "OSError: full"
    board.end("write", 2, None)
    assert board.last_error() == "OSError: away"
    board.end("fetch", 1, None)
    assert board.last_error() is None


def test_the_board_is_told_of_done_images_twice_a_second_however_fast_they_come(monkeypatch):
    clock, notes = [100.0], []
    board = SimpleNamespace(note=SimpleNamespace(remote=lambda *words: notes.append(words)))
    monkeypatch.setattr(crash_watch, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(Watch, "_call_board", lambda *words: EarlierAttempts(0, 0, []))
    watch = Watch(board, "segment 0", 7, 120)
    for number in range(1, 401):  # 4,000 images/s in batches of 32
        watch.note(32 * number)
        clock[0] += 0.008
    assert notes[0] == (7, 32) and 6 <= len(notes) <= 7


def test_log_messages_of_actors_reach_the_driver_once_and_are_bounded():
    board = CrashBoard()
    log = logging.Logger("actor")
    tell = SimpleNamespace(remote=board.tell)
    log.addHandler(BoardHandler(SimpleNamespace(tell=tell)))
    for _ in range(3):
        log.info("batches of %d images", 64)
        log.warning("the model cannot be compiled")
        log.debug("nothing")
    assert board.messages() == [
        (logging.INFO, "batches of 64 images"),
        (logging.WARNING, "the model cannot be compiled"),
    ]
    for number in range(1000):
        log.info("message %d", number)
    assert len(board.messages()) == 100
