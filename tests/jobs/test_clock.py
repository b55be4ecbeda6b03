import pytest

from jobs import clock, progress
from jobs.clock import TrainClock, describe_left, seconds_left
from jobs.train_group import FIRST_STEP, TrainingBoard


@pytest.fixture
def now(monkeypatch):
    """The time in seconds, which a test sets."""
    seconds = [0.0]
    monkeypatch.setattr(clock.time, "monotonic", lambda: seconds[0])
    return seconds


def train(times, now, clock, epochs, steps, batch):
    """Training of 20 examples an epoch; a batch of training takes times[0], one of validation times[1]."""
    lines = []
    for epoch in range(epochs):
        for step in range(steps):
            now[0] += times[0]
            clock.count("train", batch)
            lines.append(clock.line(epoch, step, 0.5))
        for _ in range(2):
            now[0] += times[1]
            clock.count("val", batch)
            lines.append(clock.line(epoch, steps))
        assert clock.end_epoch()["seconds"] == steps * times[0] + 2 * times[1]
    return lines


def test_a_long_epoch_has_a_line_every_ten_seconds_with_the_time_left(now):
    lines = train((4, 2), now, TrainClock(2, 5, 20, 8), epochs=2, steps=5, batch=4)
    assert lines[0] is lines[1] is None and sum(line is not None for line in lines) == 4  # in 48 s
    assert lines[2][0] == "epoch 1 of 2, step 3 of 5, loss 0.5000, 1.0 examples/s, 0:00:48 left"
    fields = {"epoch": 1, "epochs": 2, "step": 3, "steps": 5, "loss": 0.5, "per_s": 1.0, "left_s": 48}
    assert lines[2][1] == fields
    assert lines[5][0] == "epoch 1 of 2, validating, 4 of 8, 1.2 examples/s, 0:00:26 left"
    assert (lines[5][1]["validated"], lines[5][1]["to_validate"], lines[5][1]["left_s"]) == (4, 8, 26)


def test_a_step_that_is_longer_than_ten_seconds_has_lines_within(now):
    """Its micro-batches are counted, and not only its end."""
    training = TrainClock(1, 1, 100, 0)
    lines = []
    for _ in range(4):
        now[0] += 11
        training.count("train", 25)
        lines.append(training.line(0, 0, 0.5)[0])
    assert all(line and line.startswith("epoch 1 of 1, step 1 of 1, loss 0.5000, 2.3 examples/s, ") for line in lines)
    assert lines[0].endswith("time left unknown") and lines[1].endswith("0:00:44 left")


def test_the_time_left_is_unknown_until_something_is_done():
    assert seconds_left(0, 10, 5.0) is seconds_left(2, 10, 0.0) is None
    assert (seconds_left(2, 10, 5.0), seconds_left(12, 10, 5.0)) == (20, 0)
    assert describe_left(None) == "time left unknown" and describe_left(20) == "0:00:20 left"


def test_the_phases_of_a_training_are_told_once_each():
    board = TrainingBoard({"start": 0.0})
    for name in ("workers", "workers", "model", FIRST_STEP, "model"):
        board.reach(name, 3.0)
    lines = [text for text, _ in board.take()[0]]
    assert lines[:2] == ["the workers load the model", "the workers read the first images"]
    assert len(lines) == 3 and lines[2].startswith("seconds from the start: ")


def test_a_log_repeats_each_minute_what_a_run_waits_for(now, caplog, monkeypatch):
    """A model may load for minutes, on a slow disk or beside other work."""
    monkeypatch.setattr(progress, "shows_bars", lambda: False)
    caplog.set_level("INFO", logger="vlsm")
    shown = progress.Progress(lambda: 8, 0, 0, None, "out")
    for seconds in (0, 30, 61, 90, 121):
        now[0] = float(seconds)
        shown._show_phase({"Ray": 1.0, "model's process": 2.0} if seconds else {"Ray": 1.0})
    phase = "loading the model"
    assert caplog.messages == [
        "reading images, and starting the model's process",
        *(phase, f"{phase}, for 60 s"),
    ]
    now[0] = 150.0
    shown._show_phase({"model's process": 2.0})
    assert caplog.messages[3:] == [f"{phase}, for 120 s"]
