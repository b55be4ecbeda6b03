"""Redirects of a real HTTP server."""

import gzip
import http.server
import io
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from vlsm import storage
from vlsm.archive.archive import open_archive
from vlsm.config import MemberSettings, RunSettings, SegmentSettings
from vlsm.datasets.read import read_dataset
from vlsm.datasets.settings import DatasetSettings
from vlsm.errors import ConfigError, ImageError
from vlsm.images.fetch import read_image_bytes
from vlsm.images.reader import Reader


@pytest.fixture
def server():
    """Two servers, `url` and `other`: the files of each by path, redirects by path, and the paths that were asked."""
    sites = []
    for _ in range(2):
        site = SimpleNamespace(files={}, redirects={}, asked=[])

        class Handler(http.server.BaseHTTPRequestHandler):
            site_of_class = site

            def do_GET(self):
                self.site_of_class.asked.append(self.path)
                path = self.path.partition("?")[0]
                target, data = (table.get(path) for table in (self.site_of_class.redirects, self.site_of_class.files))
                self.send_response(302 if target else 404 if data is None else 200)
                if target:
                    self.send_header("Location", target)
                self.send_header("Content-Length", str(len(data or b"")))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(data or b"")

            do_HEAD = do_GET

            def log_message(self, *_):
                pass

        site.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        site.url = f"http://127.0.0.1:{site.server.server_port}"
        site.thread = threading.Thread(target=site.server.serve_forever, kwargs={"poll_interval": 0.01})
        site.thread.start()
        sites.append(site)
    yield SimpleNamespace(first=sites[0], other=sites[1], url=sites[0].url)
    for site in sites:
        site.server.shutdown()
        site.server.server_close()
        site.thread.join()


def picture(mode="RGB"):
    sink = io.BytesIO()
    Image.fromarray(np.full((8, 9, 3), 255, np.uint8)).convert(mode).save(sink, "PNG")
    return sink.getvalue()


def test_a_redirect_within_the_host_is_followed(server):
    server.first.files["/b.png"] = b"picture"
    for number, target in enumerate(["/b.png", f"{server.url}/b.png", "b.png"]):
        server.first.redirects[f"/{number}.png"] = target
        assert read_image_bytes(f"{server.url}/{number}.png", None, 1000) == b"picture"
        assert storage.read_bytes(f"{server.url}/{number}.png") == b"picture"


@pytest.mark.parametrize(
    "target", ["OTHER/b.png", "http://169.254.169.254/b.png", "file:///etc/passwd", "//localhost:1/b"]
)
@pytest.mark.parametrize("size_bytes", [None, 7])
def test_a_redirect_elsewhere_is_not_followed(server, target, size_bytes):
    target = target.replace("OTHER", server.other.url)
    server.other.files["/b.png"] = b"secrets"
    server.first.redirects |= {"/a.png": "/step.png", "/step.png": f"{target}?key=1"}
    with pytest.raises(ImageError, match=r"forbidden: .*/a.png redirects to .* not allowed; .* run\.allow") as caught:
        read_image_bytes(f"{server.url}/a.png", size_bytes, 1000)
    assert "key=1" not in str(caught.value)
    assert server.other.asked == []
    assert len(server.first.asked) <= 4  # it is no failure that is tried again


def test_what_is_allowed_can_be_reached_and_nothing_beside_it(server):
    server.other.files |= {"/public/b.png": b"picture", "/private/b.png": b"secrets"}
    server.first.redirects |= {f"/{name}.png": f"{server.other.url}/{name}/b.png" for name in ("public", "private")}
    allow = (f"{server.other.url}/public",)
    assert read_image_bytes(f"{server.url}/public.png", None, 1000, allow=allow) == b"picture"
    with pytest.raises(ImageError, match="forbidden: .* not allowed"):
        read_image_bytes(f"{server.url}/private.png", None, 1000, allow=allow)


def segment_settings(*allow):
    member = MemberSettings(checkpoint="")
    return SegmentSettings(input="", output="", members=(member,), run=RunSettings(allow=allow, outage_patience_s=0))


def test_a_list_gets_a_failed_row_while_planning_and_while_reading(server, tmp_path):
    server.other.files |= {"/b.tar": b"secrets", "/b.png": picture()}
    server.first.redirects |= {f"/{name}": f"{server.other.url}/{name}" for name in ("b.tar", "b.png")}
    (tmp_path / "list.csv").write_text(f"image_uri\n{server.url}/b.png\n{server.url}/b.tar\n")
    rows = list(open_archive(str(tmp_path / "list.csv"), ("polyp",)).rows)
    assert [row["problem"] is None for row in rows] == [True, False]
    assert "b.tar redirects to" in rows[1]["problem"] and rows[1]["problem"].startswith("forbidden: ")
    with pytest.raises(ImageError, match="forbidden: .*b.png redirects to"):
        Reader(segment_settings()).open(rows[0])
    assert server.other.asked == []
    content, _ = Reader(segment_settings(server.other.url)).open(rows[0])
    assert content.data == picture()


def test_an_input_that_redirects_elsewhere_is_a_sentence(server):
    server.other.files["/list.csv"] = f"image_uri\n{server.url}/a.png\n".encode()
    server.first.redirects["/list.csv"] = f"{server.other.url}/list.csv"
    with pytest.raises(ConfigError, match="^INPUT 'http.*' cannot be used: .*list.csv redirects to"):
        with storage.name_errors("INPUT", f"{server.url}/list.csv"):
            open_archive(f"{server.url}/list.csv", ("polyp",))
    rows = list(open_archive(f"{server.url}/list.csv", ("polyp",), allow=(server.other.url,)).rows)
    assert [row["image_uri"] for row in rows] == [f"{server.url}/a.png"]


def test_masks_of_a_dataset_obey_the_same_rule(server, tmp_path):
    server.other.files["/b.nii.gz"] = b"secrets"
    server.first.redirects["/b.nii.gz"] = f"{server.other.url}/b.nii.gz"
    uri = f"{server.url}/b.nii.gz"
    (tmp_path / "list.csv").write_text(f"image_uri,mask_uri\n{uri},{uri}\n")
    records = read_dataset("d", str(tmp_path / "list.csv"))
    assert [record.mask_selector for record in records] == ["every slice"]  # a volume that cannot be read
    assert server.other.asked == []
    read_dataset("d", str(tmp_path / "list.csv"), DatasetSettings().allowing((server.other.url,)))
    assert "/b.nii.gz" in server.other.asked


@pytest.mark.parametrize("query", ["", "?sig=ab/c.d%3D&se=2026", "?X-Amz-Signature=ab/cd"])
@pytest.mark.parametrize("name", ["list.csv", "list.tsv.gz", "list.jsonl"])
def test_a_list_with_a_signature_is_a_list(server, name, query):
    lines = {"list.jsonl": b'{"image_uri": "a.png"}\n', "list.csv": b"image_uri,image_id\na.png,1\n"}
    data = lines.get(name, gzip.compress(b"image_uri\timage_id\na.png\t1\n"))
    server.first.files |= {"/d/a.png": picture(), f"/d/{name}": data}
    (row,) = open_archive(f"{server.url}/d/{name}{query}", ("polyp",)).rows
    assert row["image_uri"] == f"{server.url}/d/a.png"


def test_a_labelled_list_with_a_signature_is_a_list(server):
    server.first.files |= {"/d/a.png": picture(), "/d/list.csv": b"image_uri,mask_uri,split\na.png,a.png,train\n"}
    (record,) = read_dataset("x", f"{server.url}/d/list.csv?sig=ab/cd", DatasetSettings())
    assert record.image_uri == f"{server.url}/d/a.png"
