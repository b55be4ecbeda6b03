"""HTTP servers that announce one thing and send another: a limit in bytes holds for all of them."""

import gzip
import io
import os
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import tifffile

from vlsm import storage
from vlsm.archive.expand import expand_rows
from vlsm.errors import ImageError
from vlsm.images.fetch import read_image_bytes
from vlsm.images.formats import Look

ENDLESS = 1 << 28  # bytes; a test that reads them all is too slow to pass unnoticed
DATA = bytes(range(250)) * 4


class Handler(BaseHTTPRequestHandler):
    """Sends DATA in the way that the path names, and counts the bytes."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer_status(self):
        """Answer with a status that the path names, such as /403; return whether it names one."""
        if is_status := self.path.strip("/").isdecimal():
            self.server.requests.append((self.path, None, None))
            self.send_response(int(self.path.strip("/")))
            self.send_header("Content-Length", "0")
            self.end_headers()
        return is_status

    def do_HEAD(self):
        if self.answer_status():
            return
        self.server.requests.append(("HEAD " + self.path, None, self.headers.get("Accept-Encoding")))
        self.send_response(200)
        self.send_header("Content-Length", str({"/false": 100, "/short": 2000}.get(self.path, len(self.server.data))))
        if self.path in ("/unsized", "/endless", "/packed", "/bomb"):
            self._headers_buffer.pop()  # no length
        self.end_headers()

    def do_GET(self):
        if self.answer_status():
            return
        self.server.requests.append((self.path, self.headers.get("Range"), self.headers.get("Accept-Encoding")))
        data, start = self.server.data, 0
        if self.path.startswith("/ranges") and (span := self.headers.get("Range")):
            start, end = (int(part) for part in span.removeprefix("bytes=").split("-"))
            data = data[start : end + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end}/*")
        else:
            self.send_response(206 if self.path == "/part" else 200)
        if self.path in ("/packed", "/bomb"):
            data = gzip.compress(data if self.path == "/packed" else bytes(ENDLESS // 8), 1)
            self.send_header("Content-Encoding", "gzip")
        if self.path in ("/endless", "/unsized", "/false", "/ranges-endless"):
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.send_chunks(data, self.path.endswith("endless"))
            return
        self.send_header("Content-Length", str(2000 if self.path == "/short" else len(data)))
        self.end_headers()
        self.send(data)
        self.close_connection = self.path == "/short"

    def send_chunks(self, data, is_endless):
        while data:
            self.send(b"%x\r\n%s\r\n" % (len(data), data))
            data = bytes(1 << 16) if is_endless and self.server.num_bytes < ENDLESS else b""
        self.send(b"0\r\n\r\n")

    def send(self, data):
        for start in range(0, len(data), 1 << 20):
            part = data[start : start + (1 << 20)]
            self.server.num_bytes += len(part)
            self.wfile.write(part)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):  # the client closes the connection where it has enough
        pass


@pytest.fixture
def server():
    server = Server(("127.0.0.1", 0), Handler)
    server.data, server.num_bytes, server.requests = DATA, 0, []
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()
    server.server_close()


def read(server, path, max_bytes=1000, **options):
    return read_image_bytes(server.url + path, options.pop("size_bytes", None), max_bytes, patience_s=0, **options)


@pytest.mark.parametrize("path", ["/plain", "/ranges", "/unsized", "/packed", "/false"])
def test_a_file_is_read_with_one_request_whatever_its_server_announces(server, path):
    assert read(server, path) == DATA
    assert [name for name, _, _ in server.requests] == [path]


def test_a_file_that_is_too_large_is_not_read(server):
    server.data = bytes(64 << 20)
    with pytest.raises(ImageError, match="has 67,108,864 bytes; max_image_bytes is 1,000") as caught:
        read(server, "/plain")
    assert caught.value.reason == "too_large"
    assert server.num_bytes < 32 << 20  # what fits in the buffers of the connection
    server.data = DATA
    assert read(server, "/plain") == DATA  # the connection is not one with the rest of the last file


@pytest.mark.parametrize("path", ["/endless", "/bomb", "/unsized", "/packed"])
def test_a_file_without_a_length_stops_at_the_limit(server, path):
    with pytest.raises(ImageError, match="max_image_bytes, which is 900") as caught:
        read(server, path, max_bytes=900)
    assert caught.value.reason == "too_large"
    assert server.num_bytes < 32 << 20  # what fits in the buffers of the connection


@pytest.mark.parametrize(("path", "size_bytes"), [("/endless", None), ("/ranges-endless", 100), ("/endless", 100)])
def test_a_file_that_is_longer_than_announced_stops_there(server, path, size_bytes):
    with pytest.raises(ImageError) as caught:
        read(server, path, size_bytes=size_bytes)
    assert caught.value.reason in ("unreadable", "too_large")
    assert server.num_bytes < 32 << 20


def test_a_file_that_is_shorter_than_announced_is_an_error(server):
    with pytest.raises(ImageError):
        read(server, "/short", max_bytes=5000)


def test_a_part_that_nobody_asked_for_is_no_image_and_no_list(server):
    with pytest.raises(ImageError, match="sends a part") as caught:
        read(server, "/part")
    assert caught.value.reason == "unavailable"
    fs, path = storage.open_uri(server.url + "/part")
    with pytest.raises(OSError, match="sends a part"):
        fs.cat_file(path)


def test_a_part_of_a_file_is_read(server):
    assert read(server, "/ranges", span=(10, 20)) == DATA[10:30]


def test_a_server_that_ignores_the_range_is_told(server):
    with pytest.raises(ImageError, match="sends no parts of files"):
        read(server, "/plain", span=(10, 20))
    assert server.num_bytes <= len(DATA)


@pytest.mark.parametrize("size_bytes", [None, 100])
@pytest.mark.parametrize(("status", "reason"), [(401, "forbidden"), (403, "forbidden"), (404, "missing")])
def test_an_answer_that_is_final_is_not_asked_for_again(server, status, reason, size_bytes):
    with pytest.raises(ImageError) as caught:
        read_image_bytes(f"{server.url}/{status}", size_bytes, 1000)
    assert caught.value.reason == reason
    assert len(server.requests) == 1


@pytest.mark.parametrize("size_bytes", [None, 100])
@pytest.mark.parametrize("status", [503, 429])
def test_a_busy_server_is_not_a_missing_file(server, status, size_bytes):
    with pytest.raises(ImageError) as caught:
        read(server, f"/{status}", size_bytes=size_bytes)
    assert caught.value.reason == "unavailable"
    assert str(status) in str(caught.value)


def test_nothing_packed_is_asked_for(server):
    read(server, "/ranges")
    assert {encoding for _, _, encoding in server.requests} == {"identity"}


def test_a_slow_server_is_a_timeout(server, monkeypatch):
    monkeypatch.setattr("vlsm.http_files.MAX_SILENCE_S", 0)
    monkeypatch.setattr("vlsm.http_files.MIN_BYTES_PER_S", 1 << 40)
    with pytest.raises(ImageError, match="the server sent 1,000 bytes in") as caught:
        read(server, "/ranges")
    assert caught.value.reason == "timeout"


def plan(uri):
    row = {"image_uri": uri, "image_id": "x", "prompts": ["polyp"]}
    return list(expand_rows([row], Look(), Counter(), is_list=True))


@pytest.mark.parametrize("path", ["/ranges.tif", "/unsized"])
def test_a_stack_is_planned_by_http(server, path):
    file = io.BytesIO()
    tifffile.imwrite(file, np.zeros((30, 100, 100), np.uint8), photometric="minisblack")
    server.data = file.getvalue()
    assert [row["selector"] for row in plan(server.url + path)][-1] == "page=29"


@pytest.mark.parametrize("path", ["/endless", "/bomb"])
def test_planning_stops_where_a_file_without_a_length_does_not_end(server, path, monkeypatch):
    monkeypatch.setattr("vlsm.http_files.MAX_LISTED_BYTES", 1 << 20)
    (row,) = plan(server.url + path)
    assert row["problem"].startswith("too_large")
    assert "more than 1,048,576 bytes" in row["problem"]
    assert server.num_bytes < 32 << 20


def test_a_file_without_a_length_takes_no_memory_while_it_is_listed(server):
    fs, path = storage.open_uri(server.url + "/unsized")
    with fs.open(path, "rb") as file:
        assert os.fstat(file.fileno()).st_nlink == 0  # a temporary file that has no name
        assert file.read() == DATA


def test_a_block_of_an_opened_file_is_no_longer_than_asked_for(server):
    fs, path = storage.open_uri(server.url + "/ranges-endless")
    with fs.open(path, "rb", block_size=100) as file:
        assert file.read(4) == DATA[:4]
    assert server.num_bytes < 32 << 20
