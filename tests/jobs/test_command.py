import pytest

from jobs.command import RaySession


@pytest.mark.ray
def test_what_an_interrupted_run_holds_is_released_before_its_session_ends(ray_cluster):
    """A stream of Ray Data that outlives Ray would start it anew, only to cancel its tasks."""
    released = []

    class Stream:
        def __del__(self):
            released.append(True)

    def work():
        stream = Stream()
        try:
            raise KeyboardInterrupt
        finally:
            assert stream and not released

    def run():
        with RaySession() as session:
            session.wait()
            try:
                work()
            except KeyboardInterrupt as error:
                raise ValueError from error

    with pytest.raises(ValueError) as caught:  # which keeps the traceback
        run()
    assert caught and released
