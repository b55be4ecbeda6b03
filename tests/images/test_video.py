import io
import random
import struct
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from pydicom import uid

from tests.images.test_dicom import make, save
from vlsm.config import SegmentSettings, TileSettings
from vlsm.errors import ImageError
from vlsm.images import dicom, video
from vlsm.images.dicom_video import open_stream
from vlsm.images.formats import Look, list_frames, sniff_kind
from vlsm.images.mp4_boxes import check_frames
from vlsm.images.video import list_images

av = pytest.importorskip("av")


def write(container="mp4", codec="mpeg4", num_frames=40, times_ms=None, size=(64, 48), **options):  # noqa: PLR0913
    """A video whose frames differ from each other."""
    sink = io.BytesIO()
    aspect = options.pop("aspect", None)
    with av.open(sink, "w", format=container) as output:
        stream = output.add_stream(codec, rate=25)
        stream.width, stream.height = size
        stream.pix_fmt, stream.gop_size = "yuv420p", 12
        stream.codec_context.max_b_frames = options.pop("b_frames", 0)
        stream.options = options
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if times_ms:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(len(times_ms or range(num_frames))):
            picture = np.full((size[1], size[0], 3), number * 5 % 250, np.uint8)
            picture[:8, :8] = 255
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if times_ms:
                frame.pts, frame.time_base = times_ms[number], Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return sink.getvalue()


def decode_all(data):
    """All frames in order, decoded without seeking."""
    with av.open(io.BytesIO(data)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def settings(frames=None, **more):
    return SegmentSettings(input="", output="", members=[{"checkpoint": "x"}], frames=frames, **more)


def select(data, frames, name="x.mp4"):
    return video.list_images(io.BytesIO(data), name, len(data), Look(frames=frames))[0]


FORMS = {
    "mp4": lambda: write(),
    "mov with B-frames": lambda: write("mov", b_frames=2),
    "avi": lambda: write("avi"),
    "avi with B-frames": lambda: write("avi", b_frames=2),
    "mkv with open groups": lambda: write("matroska", "mpeg2video", b_frames=2),
    "webm": lambda: write("webm", "libvpx", deadline="realtime"),
    "mpg": lambda: write("mpeg", "mpeg2video", b_frames=2),
    "transport stream": lambda: write("mpegts", "mpeg2video", b_frames=2),
    "elementary stream": lambda: write("mpeg2video", "mpeg2video", b_frames=2),
}


@pytest.mark.parametrize("form", FORMS)
def test_chosen_frames_are_those_of_a_plain_decode_in_any_order(form):
    data = FORMS[form]()
    frames = decode_all(data)
    assert len(frames) == 40
    for rule, numbers in (("every 7", range(0, 40, 7)), ("1 per second", (0, 25)), ("every 1", range(40))):
        selectors = select(data, rule)
        assert selectors == [f"frame={number}" for number in numbers]
        for order in (selectors, random.Random(1).sample(selectors, len(selectors))):
            decode = video.open_images(data, "x", settings(rule))
            for selector in order:
                np.testing.assert_array_equal(frames[int(selector[6:])], decode(selector).pixels)


TIMES_MS = [0, 40, 80, 120, 900, 940, 980, 2000, 2040, 3500, 3540, 3580, *range(4000, 4800, 40)]


@pytest.mark.parametrize("container", ["matroska", "mp4"])
def test_times_decide_where_frames_are_not_equally_long(container):
    data = write(container, times_ms=TIMES_MS, b_frames=2)
    assert select(data, "1 per second") == [f"frame={number}" for number in (0, 7, 9, 12)]
    assert len(decode_all(data)) == len(select(data, "every 1")) == len(TIMES_MS)


def test_rules():
    times_s = [number / 29.97 for number in range(90)]
    assert video.choose_frames("1 per second", times_s) == [0, 30, 60]
    assert video.choose_frames("0.5 per second", times_s) == [0, 60]
    assert video.choose_frames("1000 per second", times_s) == list(range(90))
    assert video.choose_frames("1 per second", [7.5, 7.6, 8.6]) == [0, 2]
    assert video.choose_frames("every 40", times_s) == [0, 40, 80]
    assert video.choose_frames("every 1", []) == []
    for wrong in ("every 0", "0 per second", "every", "1 per minute", "2"):
        with pytest.raises(ValueError):
            settings(wrong)


def test_one_pass_decodes_each_frame_once():
    """Requests in nearly the right order, as threads make them, cost no second decode."""
    data = write(num_frames=200)
    opened = video.Video(io.BytesIO(data), "x", 10_000, "every 10")
    decoded = []
    plain, opened._position_of = opened._position_of, lambda frame: decoded.append(frame.pts) or plain(frame)
    order = [*range(0, 200, 10)]
    for place in range(0, 20, 4):
        order[place : place + 4] = reversed(order[place : place + 4])
    for number in order:
        opened.frame(number)
    assert len(decoded) <= 200


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_a_video_is_upright(degrees):
    data = write()
    turned = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[degrees]  # clockwise
    a, b, c, d = (number << 16 for number in turned)
    matrix = data.index(b"tkhd") + 44
    data = data[:matrix] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + data[matrix + 36 :]
    image = video.open_images(data, "x", settings("every 1"))("frame=3").pixels
    np.testing.assert_array_equal(np.rot90(decode_all(data)[3], -degrees // 90), image)
    look = Look(frames="every 1", tile=TileSettings(size=32))
    assert video.list_images(io.BytesIO(data), "x", None, look)[1] == image.shape[:2]


def test_pixels_become_square():
    data = write(aspect=Fraction(4, 3))
    assert video.open_images(data, "x", settings())("frame=0").pixels.shape == (48, 85, 3)
    assert video.open_images(write(aspect=Fraction(1, 2)), "x", settings())("frame=0").pixels.shape == (96, 64, 3)


@pytest.mark.parametrize("form", ["avi", "mkv with open groups", "mpg", "elementary stream"])
def test_the_frames_before_a_damaged_end_are_good(form):
    data = FORMS[form]()
    frames, cut = decode_all(data), data[: len(data) * 8 // 10]
    selectors = select(cut, "every 1")
    decode = video.open_images(cut, "x", settings("every 1"))
    assert 10 < len(selectors) <= 40
    for selector in selectors[:-3]:
        np.testing.assert_array_equal(frames[int(selector[6:])], decode(selector).pixels)


def test_what_is_no_video_or_too_large_or_not_there():
    data = write()
    playlist = b"#EXTM3U\n#EXT-X-VERSION:3\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"
    for wrong in (b"", b"nothing" * 1000, playlist, data[: len(data) // 2]):
        with pytest.raises(ImageError, match=r"^corrupt: x\.mp4 "):
            select(wrong, None)
    with pytest.raises(ImageError, match="too_large: x is 64 x 48 = 3,072 pixels; max_pixels is 1,000"):
        video.open_images(data, "x", settings(max_pixels=1000))
    decode = video.open_images(data, "x", settings())
    with pytest.raises(ImageError, match="corrupt: x has 40 frames and no frame 40"):
        decode("frame=40")


STREAMS = {
    uid.MPEG4HP41: FORMS["mp4"],
    uid.MPEG2MPML: FORMS["elementary stream"],
    uid.MPEG2MPMLF: FORMS["mpg"],
    uid.MPEG4HP41F: FORMS["transport stream"],
}


def dicom_video(stream, syntax, num_fragments=1):
    dataset = make(np.zeros((48, 64, 3), np.uint8), syntax, PhotometricInterpretation="YBR_PARTIAL_420")
    dataset.NumberOfFrames, dataset.CineRate = 40, 25
    stream += b"\0" * (-len(stream) % (2 * num_fragments))
    length = len(stream) // num_fragments
    fragments = [stream[at : at + length] for at in range(0, len(stream), length)]
    items = [b"", *fragments]
    dataset.PixelData = b"".join(b"\xfe\xff\x00\xe0" + struct.pack("<I", len(item)) + item for item in items)
    dataset["PixelData"].VR, dataset["PixelData"].is_undefined_length = "OB", True
    return save(dataset)


@pytest.mark.parametrize("syntax", STREAMS, ids=lambda syntax: syntax.name[:30])
def test_a_video_in_a_dicom_object(syntax):
    stream = STREAMS[syntax]()
    data = dicom_video(stream, syntax, num_fragments=5 if syntax.endswith(".1") else 1)
    frames = decode_all(stream)
    for rule, numbers in ((None, [0, 25]), ("every 10", [0, 10, 20, 30])):
        found = dicom.list_images(io.BytesIO(data), "x.dcm", len(data), Look(frames=rule))
        assert found == ([f"frame={number}" for number in numbers], (48, 64))
        decode = dicom.open_images(data, "x.dcm", settings(rule))
        for number in numbers:
            np.testing.assert_array_equal(frames[number], decode(f"frame={number}").pixels)


def test_a_damaged_video_in_a_dicom_object_is_one_failed_row():
    data = dicom_video(bytes(1000), uid.MPEG4HP41)
    with pytest.raises(ImageError, match=r"corrupt: x\.dcm \(MPEG-4 AVC/H.264 .*\) cannot be read as a video"):
        list_frames(lambda: io.BytesIO(data), "x.dcm", len(data), Look())


def test_loops_are_chosen_from_by_the_same_rules():
    loop = make(np.zeros((90, 2, 2), np.uint8), frames=90)
    plain, vector, timed = save(loop), save(loop), None
    loop.FrameTime = "33.3"
    timed = save(loop).replace(b"33.3", b"33,3")
    loop.FrameTimeVector = [0] + [100] * 89
    vector = save(loop)
    for data, rule, numbers in (
        (plain, None, range(90)),
        (plain, "every 40", (0, 40, 80)),
        (plain, "1 per second", range(90)),  # it states no times
        (timed, None, range(90)),
        (timed, "1 per second", (0, 31, 61)),
        (vector, "1 per second", range(0, 90, 10)),
    ):
        found = dicom.list_images(io.BytesIO(data), "x", len(data), Look(frames=rule))[0]
        assert found == [f"frame={number}" for number in numbers]


def test_videos_are_told_by_their_beginning():
    for form in ("mp4", "mov with B-frames", "avi", "mkv with open groups", "webm", "mpg", "elementary stream"):
        assert sniff_kind(FORMS[form]()[:348], "x.dat") == "video", form


def test_without_the_extra_a_video_is_one_row_that_names_the_command(tmp_path):
    (tmp_path / "a.mp4").write_bytes(write())
    (tmp_path / "b.dcm").write_bytes(dicom_video(write(), uid.MPEG4HP41))
    code = f"""
import sys
sys.modules["av"] = None
from vlsm.archive.archive import open_archive
rows = list(open_archive({str(tmp_path)!r}, ("polyp",)).rows)
assert [row["image_id"] for row in rows] == ["a.mp4", "b.dcm"], rows
for row in rows:
    assert row["problem"].startswith("unreadable: "), row
    assert row["problem"].endswith("is a video; reading it needs `pip install 'vlsm[video]'`"), row
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("b_frames", [0, 2])
@pytest.mark.parametrize("num_frames", [40, 8])
def test_frames_that_an_edit_list_cuts_off_have_no_number(num_frames, b_frames):
    data = write(num_frames=num_frames, b_frames=b_frames)
    place = data.index(b"elst") + 16
    begin = struct.unpack_from(">i", data, place)[0] + 5 * 512  # 12,800 ticks a second
    data = data[:place] + struct.pack(">i", begin) + data[place + 4 :]
    frames, selectors = decode_all(data), select(data, "every 1")
    assert len(frames) == len(selectors) == num_frames - 5
    decode = video.open_images(data, "x", settings("every 1"))
    for selector in reversed(selectors):
        np.testing.assert_array_equal(frames[int(selector[6:])], decode(selector).pixels)


def mp4(**options):
    file = io.BytesIO()
    with av.open(file, "w", format="mp4", options=options) as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for level in range(0, 200, 20):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), level, np.uint8))))
        container.mux(stream.encode())
    return file.getvalue()


def claim(data, count, is_sound=False, length=1024):
    """A video whose tables state a number of equal samples, each so long."""
    data = bytearray(data)
    for kind, start, numbers in (("stsz", 8, (1, count)), ("stts", 8, (1, count, length)), ("stsc", 12, (1, count, 1))):
        place = data.index(kind.encode()) + start
        data[place : place + 4 * len(numbers)] = struct.pack(f">{len(numbers)}I", *numbers)
    return bytes(data).replace(b"vide", b"soun", 1) if is_sound else bytes(data)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(lambda: claim(mp4(), 50_000_000), id="table"),
        pytest.param(lambda: claim(mp4(), 50_000_000, is_sound=True), id="sound"),
        pytest.param(lambda: b"\0\0\0\x08free" + claim(mp4(), 10**9), id="behind another box"),
        pytest.param(  # the user data of the file end with zeros, as QuickTime writes them
            lambda: claim(mp4(), 10**9).replace(b"moov", b"moov\0\0\0\x0cudta\0\0\0\0", 1), id="behind zeros"
        ),
        pytest.param(
            lambda: mp4(movflags="frag_keyframe+empty_moov").replace(
                b"trun\0\0", b"trun" + bytes(4) + struct.pack(">I", 10**9) + b"xx", 1
            ),
            id="fragment",
        ),
    ],
)
def test_more_frames_than_any_video_has_are_refused_before_ffmpeg_counts_them(data):
    with pytest.raises(ImageError, match="frames; 4,000,000 are the most"):
        list_images(io.BytesIO(data()), "x.mp4", None, Look())


@pytest.mark.parametrize("flags", ["", "frag_keyframe+empty_moov"])
def test_ordinary_tables_and_uncompressed_sound_pass(flags):
    data = mp4(**({"movflags": flags} if flags else {}))
    assert list_images(io.BytesIO(data), "x.mp4", None, Look())[0] == ["frame=0"]
    if not flags:
        check_frames(io.BytesIO(claim(data, 100_000_000, is_sound=True, length=1)), "x.mp4")


def test_more_fragments_than_the_limit_are_an_error(monkeypatch):
    monkeypatch.setattr("vlsm.images.dicom_video.MAX_IMAGES", 50)
    data = save(make(np.zeros((8, 8), np.uint8)))
    data = data[: data.rindex(b"\xe0\x7f\x10\x00")] + b"\xe0\x7f\x10\x00OB\0\0\xff\xff\xff\xff"
    item = b"\xfe\xff\x00\xe0\0\0\0\0"
    assert open_stream(io.BytesIO(data + item * 50), "x").read() == b""
    with pytest.raises(ImageError, match="more than 50 fragments"):
        open_stream(io.BytesIO(data + item * 51), "x")
