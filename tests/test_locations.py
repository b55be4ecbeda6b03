import pytest

from vlsm.locations import leads_upwards, lies_in, may_redirect, own_place


@pytest.mark.parametrize(
    ("location", "place"),
    [
        ("s3://data/a/b.png", "s3://data/a"),
        ("s3://data/a/b.png", "s3://data/a/"),
        ("s3://data/a/b.png", "s3://data/a/b.png"),
        ("s3://data/a/b.png", "s3://"),
        ("s3a://data/a%2e%2e/b.png", "s3://data"),  # in a bucket, percent signs are literal
        ("gcs://data/a.png", "gs://data"),
        ("/data/a.png", "/data"),
        ("file:///data/a.png", "/data/"),
        ("/data/a.png", "file:///data"),
        ("/data/a.png", "/"),
        ("http://host/a b.png", "http://host/a%20b.png"),
        ("http://HOST:80/a/b", "http://host/a"),
        ("https://host/a/b", "http://host/a"),
        ("http://user:word@host/a?signature=..", "http://host"),
        ("http://host?query", "http://host/"),
    ],
)
def test_a_place_holds_what_is_in_it_by_every_name(location, place):
    assert lies_in(location, place)


@pytest.mark.parametrize(
    ("location", "place"),
    [
        ("s3://data-secret/a.png", "s3://data"),
        ("s3://data/ab/c.png", "s3://data/a"),
        ("s3://data/a/../b.png", "s3://data/a"),
        ("S3://data/a.png", "s3://data"),
        ("simplecache::s3://data/a.png", "s3://data"),
        ("file:///data/../etc/passwd", "/data"),
        ("file://data/a.png", "/data"),  # a relative path
        ("local:///etc/passwd", "/data"),
        ("FILE:///data/a.png", "/data"),
        ("file:///data/a.png", "s3://data"),
        ("http://host.evil/a", "http://host"),
        ("http://host@evil/a", "http://host"),
        ("http://evil?@host/a", "http://host"),
        ("http://evil#@host/a", "http://host"),
        ("http://evil\\@host/a", "http://host"),
        ("http://x@host@evil/a", "http://host"),
        ("http://host:8080/a", "http://host"),
        ("http://host/a", "https://host"),
        ("https://host:8000/a", "http://host:8000"),
        ("http://host/a/%2e%2e/b", "http://host/a"),
        ("http://host/a/%252e%252e/b", "http://host/a"),
        ("http://host/a/..%5cb", "http://host/a"),
        ("zip://a.png::/data/x.zip", "/data"),
    ],
)
def test_a_place_does_not_hold_what_only_looks_so(location, place):
    assert not lies_in(location, place)


@pytest.mark.parametrize(
    ("uri", "place"),
    [
        ("s3://data/a/list.csv", "s3://data"),
        ("s3a://data", "s3a://data"),
        ("s3://arn:aws:s3:eu:1:accesspoint/mine/list.csv", "s3://arn:aws:s3:eu:1:accesspoint/mine"),
        ("http://host:81/a/list.csv", "http://host:81"),
        ("https://host?list=1/2", "https://host"),
        ("https://user:word@host/list.csv", "https://host"),
        ("sftp://host/home/me/list.csv", "sftp://host/home/me"),
        ("hf://datasets/me/polyps/list.csv", "hf://datasets/me/polyps"),
    ],
)
def test_the_own_place_is_a_bucket_or_a_host_or_else_a_folder(uri, place):
    assert own_place(uri) == place


def test_upwards_is_a_part_and_no_text_in_a_name():
    assert not leads_upwards("s3://data/a..b/..c.png")
    assert not leads_upwards("http://host/get?file=../x")
    assert leads_upwards("s3://data/..")


@pytest.mark.parametrize(
    ("target", "allow", "is_followed"),
    [
        ("http://host/b", (), True),
        ("https://host/b", (), True),
        ("http://host:81/b", (), False),
        ("http://169.254.169.254/latest", (), False),
        ("http://other/b", ("http://other",), True),
        ("http://other/b", ("http://other-2",), False),
        ("http://host/private/b", ("http://host/public",), False),  # the file lies in public
        ("http://other/b", ("http://host/public", "http://other"), True),
        ("file:///etc/passwd", ("/etc",), False),
    ],
)
def test_a_redirect_stays_where_its_file_may_be(target, allow, is_followed):
    assert may_redirect("http://host/public/a", target, allow) == is_followed
