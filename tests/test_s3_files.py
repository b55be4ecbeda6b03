"""What obstore serves, and that everything else is as with s3fs alone: keys, settings, reasons, waits, secrets."""

import copy
import dataclasses
import datetime
import os
import pickle
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import unquote

import fsspec
import pytest
from s3fs import S3FileSystem

from jobs.benchmarks.stores import make_certificates
from tests.conftest import LONG_S
from tests.stub_store import StubStore, refusal
from vlsm import s3_clients, s3_files, storage, stores
from vlsm.errors import ImageError, StorageError
from vlsm.images.fetch import read_image_bytes
from vlsm.stores import open_uri

URI = "s3://bucket/folder/a.png"
CONTENT = bytes(range(256)) * 40
SIZE = len(CONTENT)


@pytest.fixture
def environment(monkeypatch, tmp_path):
    """No settings of S3 but credentials and a region."""
    for name in list(os.environ):
        if name.startswith("AWS_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "TheKey" if name.endswith("ID") else "TheSecret")
    monkeypatch.setenv("AWS_REGION", "eu-west-9")
    S3FileSystem.clear_instance_cache()
    yield monkeypatch
    S3FileSystem.clear_instance_cache()


@pytest.fixture
def store(environment):
    """A store with one object, which the environment names."""
    quick = {"config_kwargs": {"retries": {"max_attempts": 0}}}  # no waits of botocore
    environment.setattr(stores, "_s3_options", lambda: copy.deepcopy(quick))
    environment.setattr(S3FileSystem, "retries", 1)
    with StubStore(objects={"/bucket/folder/a.png": CONTENT}) as stub:
        environment.setenv("AWS_ENDPOINT_URL", stub.url)
        yield stub


@pytest.fixture
def client(store, each_client):
    """Which client serves a bucket that has answered."""
    return each_client


def read(uri=URI, size=SIZE, **limits):
    return read_image_bytes(uri, size, 10**6, **limits)


def opened(store, uri=URI):
    """Read once, so that the bucket is open."""
    assert read(uri) == CONTENT
    store.requests.clear()


def test_obstore_serves_a_bucket_that_has_answered(store):
    assert [read(), read(), read()] == [CONTENT] * 3
    assert store.clients() == ["s3fs", "obstore", "obstore"]
    storage.write_bytes("s3://bucket/part", b"masks")
    storage.write_bytes("s3://bucket/empty", b"")
    assert store.clients() == ["obstore", "obstore"]
    assert store.objects["/bucket/part"] == b"masks" and store.objects["/bucket/empty"] == b""
    assert read_image_bytes(URI, None, 10**6, span=(10, 20)) == CONTENT[10:30]
    assert store.clients()[-1] == "obstore"


def test_a_file_whose_size_no_list_states_takes_one_request(store):
    store.objects |= {"/bucket/large": bytes(10**6 + 1), "/bucket/most": bytes(10**6), "/bucket/empty": b""}
    opened(store)
    assert read(size=None) == CONTENT and read("s3://bucket/most", None) == bytes(10**6)
    assert [(request.client, request.method) for request in store.requests] == [("obstore", "GET")] * 2
    for name, reason in {"large": "too_large", "empty": "empty", "gone": "missing"}.items():
        with pytest.raises(ImageError) as caught:
            read(f"s3://bucket/{name}", None)
        assert caught.value.reason == reason
    store.requests.clear()
    assert read(size=100) == CONTENT  # it has grown since the list was made
    assert store.clients() == ["obstore"] * 2


PART = (206, {"Content-Range": f"bytes 0-99/{SIZE}"}, CONTENT[:100])  # nobody has asked for a part


@pytest.mark.parametrize(
    "fault", [refusal(503, "SlowDown"), "reset", "cut", PART], ids=["busy", "reset", "cut", "a part"]
)
def test_a_file_of_unknown_size_comes_whole_or_not_at_all(client, store, delays, fault):
    opened(store)
    store.fault = lambda request: fault if request.method == "GET" and "a.png" in request.path else None
    with pytest.raises(ImageError) as caught:
        read(size=None, patience_s=2.5)
    assert (caught.value.reason, len(delays)) == ("unavailable", 2)
    store.fault = None
    assert read(size=None) == CONTENT


def test_credentials_that_expire_end_a_run_whose_list_has_no_sizes(client, store):
    """The answer to HEAD has no body, and so no reason."""
    opened(store)
    store.fault = lambda _: refusal(403, "ExpiredToken")
    with pytest.raises(StorageError, match="no longer takes the credentials: ExpiredToken"):
        read(size=None)


def test_a_file_of_unknown_size_that_is_too_large_is_not_read(store):
    opened(store)
    store.fault = lambda _: "endless"
    with pytest.raises(ImageError, match="too_large: .* has 1,0"):
        read(size=None)
    store.stopped.wait(20)
    assert store.num_sent_bytes < 30 << 20  # buffers of the sockets


def test_threads_share_one_client(store):
    opened(store)
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: read(), range(40))) == {CONTENT}
    assert set(store.clients()) == {"obstore"}
    assert len(open_uri(URI)[0]._lanes["bucket"]._stores) <= 2  # with and without a timeout


@pytest.fixture
def delays(monkeypatch):
    """The waits between tries, which take no time."""
    delays = []
    monkeypatch.setattr(storage.time, "sleep", delays.append)
    return delays


@pytest.mark.parametrize(
    ("fault", "reason", "num_waits"),
    [
        (refusal(404, "NoSuchKey"), "missing", 0),
        (refusal(404, "NoSuchBucket"), "missing", 0),
        (refusal(403, "AccessDenied"), "forbidden", 0),
        (refusal(400, "InvalidRequest"), "unavailable", 2),
        (refusal(412, "PreconditionFailed"), "unavailable", 2),
        (refusal(416, "InvalidRange"), "unavailable", 2),
        (refusal(429, "TooManyRequests"), "unavailable", 2),
        (refusal(500, "InternalError"), "unavailable", 2),
        (refusal(503, "SlowDown"), "unavailable", 2),
        ((200, {}, b"no range"), "unavailable", 2),
        ("reset", "unavailable", 2),
        ("cut", "unavailable", 2),
    ],
    ids=lambda value: str(value[2])[8:30] if isinstance(value, tuple) else value,
)
def test_a_fault_has_the_reason_and_the_waits_of_s3fs(client, store, delays, fault, reason, num_waits):
    opened(store)
    store.fault = lambda request: fault if request.method == "GET" and "a.png" in request.path else None
    with pytest.raises(ImageError) as caught:
        read(patience_s=2.5)
    assert (caught.value.reason, len(delays)) == (reason, num_waits)
    assert not any(word in str(caught.value) for word in ("Generic S3", "object_store", "TheKey"))
    tries = 3 if fault[0] == 200 else 1  # obstore is not asked again while s3fs fails
    assert store.clients().count("obstore") == (tries if client == "obstore" else 0)
    store.fault = None
    assert [read(), read()] == [CONTENT] * 2
    assert store.clients()[-1] == client


def test_a_server_that_hangs_is_waited_for_as_long_as_the_limit_says(client, store, delays):
    opened(store)
    store.fault = lambda request: "hang" if "a.png" in request.path else None
    with pytest.raises(ImageError) as caught:
        read(timeout_s=0.5)
    assert caught.value.reason == "timeout"
    assert len([request for request in store.requests if "a.png" in request.path]) == 1


@pytest.mark.parametrize("code", "ExpiredToken InvalidAccessKeyId SignatureDoesNotMatch RequestTimeTooSkewed".split())
def test_credentials_that_expire_during_a_run_end_it(client, store, code):
    opened(store)
    store.fault = lambda _: refusal(403, code, "StringToSign TheSecret")
    with pytest.raises(StorageError, match=f"no longer takes the credentials: {code}"):
        read()


@pytest.mark.parametrize("fault", [refusal(503, "SlowDown"), refusal(403, "AccessDenied"), "reset"], ids=str)
def test_a_part_that_obstore_cannot_write_is_written_by_s3fs(store, delays, fault):
    opened(store)
    store.fault = lambda request: fault if request.client == "obstore" else None
    storage.write_bytes("s3://bucket/part", b"masks")
    assert store.objects["/bucket/part"] == b"masks" and delays == []
    assert store.clients() == ["obstore", "s3fs"]


def test_an_outage_is_waited_for(client, store, delays):
    opened(store)
    faults = iter(["reset"] * 9)  # aiohttp repeats some requests itself
    store.fault = lambda _: next(faults, None)
    storage.write_bytes("s3://bucket/part", b"masks")
    assert store.objects["/bucket/part"] == b"masks" and 2 <= len(delays) <= 9


def test_what_s3fs_does_in_several_requests_stays_there(store, monkeypatch):
    opened(store)
    monkeypatch.setattr(s3_files, "_MAX_PUT_BYTES", 3)
    storage.write_bytes("s3://bucket/part", b"masks")
    assert storage.read_bytes("s3://bucket/part") == b"masks"  # s3fs compares checksums
    assert storage.create_bytes("s3://bucket/new", b"record")
    assert set(store.clients()) == {"s3fs"}


def test_obstore_follows_no_redirect_to_another_host(store):
    opened(store)
    with StubStore(host="127.0.0.2", objects={"/bucket/folder/a.png": b"x" * len(CONTENT)}) as other:
        elsewhere = (307, {"Location": f"{other.url}/bucket/folder/a.png"}, b"")
        store.fault = lambda request: elsewhere if request.client == "obstore" else None
        assert read() == CONTENT
        assert store.clients() == ["obstore", "s3fs"] and other.requests == []


def test_no_more_is_read_than_was_asked_for(store):
    opened(store)
    store.fault = lambda _: "endless"
    assert open_uri(URI)[0].cat_file("bucket/folder/a.png", start=0, end=1000) == bytes(1000)
    assert store.clients() == ["obstore"]
    store.stopped.wait(20)
    assert store.num_sent_bytes < 30 << 20  # buffers of the sockets


ODD_KEYS = ["a//b", "/a", "a/", "b//", "a/../b", "../a", "a/.", "./a", ".", "..", "a\nb", "a\x7f", "a\u202eb"]
KEYS = [
    *(f"a{letter}b" for letter in " !\"#$%&'()*+,-.:;<=>?@[\\]^_`{|}~"), "a%20b", "%2e%2e", "a..b", "...", ".hidden",
    "~", "e\u0301", "\u00e9", "\u4e2d/\u6587.png", "\U0001f600", "x" * 200, "a?versionId=1",
]  # fmt: skip


def test_both_clients_ask_for_the_same_key(store):
    opened(store)
    fs = open_uri(URI)[0]
    readings = (fs.cat_file, lambda path, **span: s3_files.sync(fs.loop, fs._cat_file, path, **span))
    for path in [*(f"bucket/x{key}" for key in KEYS), *(f"bucket/{key}" for key in ODD_KEYS)]:
        asked, clients = [], []
        for reading in readings:
            with pytest.raises(FileNotFoundError):
                reading(path, start=0, end=9)
            asked.append(unquote(store.requests[0].path.partition("?")[0]))
            clients.append(store.clients()[0])
        assert asked[0] == asked[1], path
        assert clients == ["obstore" if path.removeprefix("bucket/x") in KEYS else "s3fs", "s3fs"], path


def test_the_real_server_has_the_same_files_for_both_clients(s3_folder):
    fs, plain = open_uri(s3_folder)[0], S3FileSystem(use_listings_cache=False)
    for number, key in enumerate(KEYS):
        plain.pipe_file(f"{s3_folder}/plain/{key}", b"%d" % number)
        fs.pipe_file(f"{s3_folder}/fast/{key}", b"%d" % number)
    names = {
        folder: [path.partition(f"/{folder}/")[2] for path in sorted(plain.find(f"{s3_folder}/{folder}"))]
        for folder in ("plain", "fast")
    }
    assert names["plain"] == names["fast"] and len(names["fast"]) > len(KEYS) - 3
    for number, key in enumerate(KEYS):
        for folder in ("plain", "fast"):
            assert read_image_bytes(f"{s3_folder}/{folder}/{key}", 2, 100) == b"%d" % number


def config(folder, text, **variables):
    """Environment variables with a configuration file of AWS."""
    (folder / "config").write_text(text)
    return {"AWS_CONFIG_FILE": str(folder / "config"), **variables}


STRAY = (
    "AWS_ENDPOINT AWS_BUCKET AWS_SKIP_SIGNATURE AWS_VIRTUAL_HOSTED_STYLE_REQUEST AWS_S3_EXPRESS AWS_REQUEST_PAYER "
    "AWS_UNSIGNED_PAYLOAD AWS_ALLOW_HTTP AWS_PROXY_URL AWS_ALLOW_INVALID_CERTIFICATES AWS_TOKEN"
)
SETTINGS = {
    "environment": lambda folder: ({}, {}),
    "token": lambda folder: ({"AWS_SESSION_TOKEN": "TheToken"}, {}),
    "profile": lambda folder: (
        config(
            folder,
            "[profile x]\nregion = us-far-1\naws_access_key_id = Profile\naws_secret_access_key = s\n",
            AWS_PROFILE="x",
            AWS_ACCESS_KEY_ID="",
            AWS_SECRET_ACCESS_KEY="",
            AWS_REGION="",
        ),
        {},
    ),  # fmt: skip
    "process": lambda folder: (
        config(
            folder,
            "[default]\ncredential_process = echo "
            """'{"Version": 1, "AccessKeyId": "Process", "SecretAccessKey": "s", "SessionToken": "t"}'\n""",
            AWS_ACCESS_KEY_ID="",
            AWS_SECRET_ACCESS_KEY="",
        ),
        {},
    ),  # fmt: skip
    "anonymous": lambda folder: ({}, {"anon": True}),
    "fsspec": lambda folder: ({}, {"key": "Given", "secret": "s", "client_kwargs": {"region_name": "x-y-1"}}),
    "no proxy": lambda folder: ({"HTTP_PROXY": "http://127.0.0.1:1", "NO_PROXY": "127.0.0.1"}, {}),
    "another proxy": lambda folder: ({"ALL_PROXY": "http://127.0.0.1:1", "https_proxy": "http://127.0.0.1:1"}, {}),
    "stray": lambda folder: (dict.fromkeys(STRAY.split(), "true") | {"AWS_SESSION_TOKEN": ""}, {}),
}


def facts(request):
    """What two requests for the same object have in common: all but times, checksums and names of clients."""
    signature = request.headers.get("authorization", "")
    token = request.headers.get("x-amz-security-token")
    return request.headers["host"], request.path, signature.partition(", ")[0], token, request.headers["range"]


@pytest.mark.parametrize("name", SETTINGS)
def test_obstore_signs_as_s3fs_does_with_any_settings(store, environment, tmp_path, name):
    variables, options = SETTINGS[name](tmp_path)
    for variable, value in variables.items():
        environment.setenv(variable, value) if value else environment.delenv(variable, raising=False)
    environment.setitem(fsspec.config.conf, "s3", options)
    S3FileSystem.clear_instance_cache()
    assert [read(), read()] == [CONTENT] * 2
    first, second = store.requests
    assert (first.client, second.client) == ("s3fs", "obstore")
    assert facts(first) == facts(second)
    assert ("authorization" in second.headers) == (name != "anonymous")
    if name in ("token", "process"):
        assert second.headers["x-amz-security-token"] in ("TheToken", "t")


@pytest.mark.parametrize(
    ("variables", "options", "reason"),
    [
        ({}, {"requester_pays": True}, "requests have the header x-amz-request-payer"),
        ({}, {"s3_additional_kwargs": {"ServerSideEncryption": "AES256"}}, "s3_additional_kwargs is set"),
        ({"AWS_SERVER_SIDE_ENCRYPTION": "AES256"}, {}, "AWS_SERVER_SIDE_ENCRYPTION is set, which s3fs does not know"),
        ({"HTTP_PROXY": "STORE", "AWS_ENDPOINT_URL": "http://store.invalid"}, {}, "a proxy is used"),
    ],
)
def test_what_obstore_would_do_differently_stays_with_s3fs(store, environment, caplog, variables, options, reason):
    caplog.set_level("INFO", "vlsm")
    store.objects["http://store.invalid/bucket/folder/a.png"] = CONTENT
    for name, value in variables.items():
        environment.setenv(name, value.replace("STORE", store.url))
    environment.setitem(fsspec.config.conf, "s3", options)
    S3FileSystem.clear_instance_cache()
    assert [read(), read()] == [CONTENT] * 2
    assert store.clients() == ["s3fs", "s3fs"]
    line = f"s3://bucket is served by s3fs alone, which takes more CPU time: {reason}"
    assert [message for message in caplog.messages if "s3fs" in message] == [line]


def test_without_obstore_s3fs_serves(store, environment, caplog):
    caplog.set_level("INFO", "vlsm")
    for name in ("obstore", "obstore.store"):
        environment.setitem(sys.modules, name, None)
    assert [read(), read()] == [CONTENT] * 2
    assert store.clients() == ["s3fs", "s3fs"]
    assert any("the package obstore is not installed" in message for message in caplog.messages)


@pytest.mark.parametrize("fault", [refusal(403, "AccessDenied", "Signature TheSecret"), refusal(404, "NoSuchKey")])
def test_a_store_that_refuses_obstore_is_left_to_s3fs_and_no_secret_is_logged(store, caplog, fault):
    caplog.set_level("INFO", "vlsm")
    opened(store)
    store.fault = lambda request: fault if request.client == "obstore" else None
    assert {read() for _ in range(9)} == {CONTENT}
    assert store.clients().count("obstore") == 5
    (line,) = [message for message in caplog.messages if "s3fs alone" in message]
    assert "obstore fails where s3fs succeeds" in line and "The" not in line and "Signature" not in line


def test_threads_that_fail_together_leave_the_bucket_to_obstore(store, caplog):
    opened(store)
    together, tickets = threading.Barrier(8), iter(range(8))

    def fail_together(request):
        if request.client == "obstore" and next(tickets, None) is not None:
            together.wait(20)
            return "reset"
        return None

    store.fault = fail_together
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: read(), range(8))) == {CONTENT}
    store.fault = None
    store.requests.clear()
    assert [read(), read()] == [CONTENT] * 2
    assert store.clients()[-1] == "obstore"


def test_credentials_that_botocore_refreshes_reach_obstore(store, environment, tmp_path):
    expires = datetime.datetime.now(datetime.UTC) + datetime.timedelta(minutes=5)  # botocore asks again at each request
    text = f'{{"Version": 1, "AccessKeyId": "KEY", "SecretAccessKey": "s", "Expiration": "{expires.isoformat()}"}}'
    (tmp_path / "keys").write_text(text.replace("KEY", "First"))
    process = config(tmp_path, f"[default]\ncredential_process = cat {tmp_path}/keys\n")
    environment.setenv("AWS_CONFIG_FILE", process["AWS_CONFIG_FILE"])
    environment.delenv("AWS_ACCESS_KEY_ID")
    environment.delenv("AWS_SECRET_ACCESS_KEY")
    S3FileSystem.clear_instance_cache()
    opened(store)
    (tmp_path / "keys").write_text(text.replace("KEY", "Second"))
    read()
    open_uri(URI)[0]._lanes["bucket"]._fresh_until_s = 0  # a minute later
    read()
    read()
    assert [request.client for request in store.requests] == ["obstore", "s3fs", "obstore"]
    keys = [request.headers["authorization"].partition("Credential=")[2][:5] for request in store.requests]
    assert keys == ["First", "Secon", "Secon"]


FORK = """
import os, sys
from vlsm.images.fetch import read_image_bytes
def read():
    return len(read_image_bytes("s3://bucket/folder/a.png", 10240, 10**6))
lengths = [read(), read()]
if os.fork() == 0:
    print("fork", read(), read(), flush=True)
    os._exit(0)
os.wait()
print("parent", *lengths, read())
"""


def test_a_fork_reads_with_s3fs_and_its_parent_goes_on(store):
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=LONG_S)
    assert done.stdout.split() == ["fork", "10240", "10240", "parent", "10240", "10240", "10240"], done.stderr
    assert store.clients() == ["s3fs", "obstore", "s3fs", "s3fs", "obstore"]


def test_a_person_can_interrupt_a_request_that_hangs(store):
    opened(store)
    store.hang_s = 5

    def interrupt(_):
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        return "hang"

    store.fault = interrupt
    with pytest.raises(KeyboardInterrupt):
        read()
    assert (store.num_hanging, store.clients()) == (1, ["obstore"])


def test_a_pickled_file_system_opens_the_bucket_itself(store):
    opened(store)
    data = pickle.dumps(open_uri(URI)[0])
    S3FileSystem.clear_instance_cache()
    fs = pickle.loads(data)
    assert [fs.cat_file("bucket/folder/a.png", start=0, end=3) for _ in range(2)] == [CONTENT[:3]] * 2
    assert store.clients() == ["s3fs", "obstore"]


def test_certificates_are_checked_against_the_bundle_of_the_environment(environment, tmp_path):
    import obstore
    from obstore.exceptions import BaseError

    ca, *files = make_certificates(tmp_path / "own")
    other, *_ = make_certificates(tmp_path / "other")
    with StubStore(tls=files, objects={"/bucket/folder/a.png": CONTENT}) as stub:
        environment.setenv("AWS_ENDPOINT_URL", stub.url)
        environment.setenv("AWS_CA_BUNDLE", ca)
        assert [read(), read()] == [CONTENT] * 2
        assert stub.clients() == ["s3fs", "obstore"]
        access = open_uri(URI)[0]._lanes["bucket"]._access
        for ca_path, is_trusted in ((ca, True), (other, False)):
            asked = s3_clients.make_store(dataclasses.replace(access, ca_path=ca_path), 5.0)
            try:
                assert len(obstore.get_range(asked, "folder/a.png", start=0, end=9)) == 9 and is_trusted
            except BaseError:
                assert not is_trusted
