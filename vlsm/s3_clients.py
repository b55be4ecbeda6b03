"""Clients of obstore that send the requests of s3fs.

obstore spends about a quarter of the CPU time of s3fs on a request, but it has its own rules for settings and names. So
s3fs decides: it resolves profiles, roles, endpoints, regions and styles of addresses with botocore, and signs one
request, which is not sent. A client of obstore gets its address, region and credentials. `NotAlike` says what a client
of obstore would do differently; s3fs then serves the bucket alone.
"""

import dataclasses
import datetime
import os
import re
import uuid
from typing import Any
from urllib.parse import urlsplit

from botocore.httpsession import get_cert_path
from botocore.utils import get_environ_proxies

from vlsm.errors import VlsmError

_SIGNED = re.compile(r"AWS4-HMAC-SHA256 Credential=(?P<key>[^/,]+)/\d+/(?P<region>[^/,]+)/s3/aws4_request, .*")
_USUAL_HEADERS = {
    "accept-encoding",
    "amz-sdk-invocation-id",
    "amz-sdk-request",
    "authorization",
    "user-agent",
    "x-amz-checksum-mode",  # stores send no checksum of a range
    "x-amz-content-sha256",
    "x-amz-date",
    "x-amz-security-token",
}
_FOREIGN = ("AWS_CHECKSUM_ALGORITHM", "AWS_SERVER_SIDE_ENCRYPTION", "AWS_SSE_")  # variables that only obstore reads
# A proxy that nobody can be: obstore follows redirects, and reads the proxies of the environment by rules of its own.
# Requests to any host but the bucket's own end here.
_NOWHERE = "http://127.0.0.1:0"
_FOREVER = datetime.timedelta(days=1)


class NotAlike(VlsmError):
    """A client of obstore would do something else than s3fs; the text says what."""


@dataclasses.dataclass(frozen=True)
class Access:
    """How s3fs reaches a bucket.

    Attributes:
        url: of the bucket: the key of an object follows it, behind a slash.
        region: that requests are signed for; "" if they are not signed.
        credentials: access key, secret key and token; None if requests are not signed.
        ca_path: file with the certificates of trusted authorities; "" without TLS.
        connect_s, read_s: how long a connection, and a silent server, is waited for.
    """

    url: str
    region: str
    credentials: tuple[str, str, str | None] | None = dataclasses.field(repr=False)
    ca_path: str
    connect_s: float
    read_s: float


class _NotSent(Exception):
    """The request is signed; it goes nowhere."""


async def find_access(fs: Any, bucket: str) -> Access:
    """Return how an S3FileSystem reaches a bucket now. Credentials that are about to expire are refreshed.

    Raises:
        NotAlike: a client of obstore would not do the same.
    """
    if fs.s3_additional_kwargs:
        raise NotAlike("s3_additional_kwargs is set")
    if names := [name for name in os.environ if name.upper().startswith(_FOREIGN)]:
        raise NotAlike(f"{names[0]} is set, which s3fs does not know")
    request, client = await _sign_request(fs, bucket)
    url, config = request.url, client.meta.config
    if config.client_cert:
        raise NotAlike("client_cert is set")
    if (config.proxies or get_environ_proxies(url)).get(url.partition(":")[0]):
        raise NotAlike("a proxy is used")
    if other := {name.lower() for name in request.headers} - _USUAL_HEADERS:
        raise NotAlike(f"requests have the header {min(other)}")
    region, credentials = await _read_signature(request.headers.get("Authorization"), client)
    ca_path = get_cert_path(_find_verify(fs)) if url.startswith("https") else ""
    return Access(url, region, credentials, ca_path, float(config.connect_timeout), float(config.read_timeout))


async def _sign_request(fs: Any, bucket: str) -> tuple[Any, Any]:
    """Return a request for an object as s3fs signs it, and the client of botocore. Its URL is the bucket's."""
    await fs.set_session()
    client, key = await fs.get_s3(bucket), uuid.uuid4().hex
    requests: list[Any] = []

    def keep(request: Any, **_: Any) -> None:
        if key in request.url:  # other requests pass
            requests.append(request)
            raise _NotSent

    client.meta.events.register_first("before-send.s3.GetObject", keep, unique_id=key)
    try:
        await fs._call_s3("get_object", Bucket=bucket, Key=key)
    except _NotSent:
        (request,) = requests
    finally:
        client.meta.events.unregister("before-send.s3.GetObject", keep, unique_id=key)
    request.url, _, rest = request.url.partition(f"/{key}")
    if rest:
        raise NotAlike("its URLs have a query")
    return request, client


async def _read_signature(signature: str | bytes | None, client: Any) -> tuple[str, tuple[str, str, str | None] | None]:
    """Return the region and the credentials of a signature."""
    if signature is None:
        return "", None
    found = _SIGNED.fullmatch(signature if isinstance(signature, str) else signature.decode())
    if found is None:
        raise NotAlike("signatures are of another kind")
    frozen = await client._request_signer._credentials.get_frozen_credentials()
    if frozen.access_key != found["key"]:
        raise NotAlike("its credentials are its own")
    return found["region"], (frozen.access_key, frozen.secret_key, frozen.token)


def _find_verify(fs: Any) -> str | bool:
    """Return the setting that says which certificates are trusted: True, or a file."""
    verify = fs.client_kwargs.get("verify")
    if verify is None:
        verify = fs.session.get_config_variable("ca_bundle")
    if verify is False:
        raise NotAlike("certificates are not checked")
    return True if verify is None else verify


def make_store(access: Access, timeout_s: float | None) -> Any:
    """Return a store of obstore for a bucket.

    What its environment variables could change is stated here. Certificates that the system trusts are trusted beside
    those of `Access.ca_path`.

    Args:
        access: how the bucket is reached.
        timeout_s: limit of a request, or None.
    """
    # each of its threads would idle otherwise, one per core and process; two carry several GB/s
    os.environ.setdefault("TOKIO_WORKER_THREADS", "2")
    from obstore.store import S3Store

    is_plain = access.url.startswith("http://")
    client: dict[str, Any] = {
        "allow_http": is_plain,
        "allow_invalid_certificates": False,
        "connect_timeout": datetime.timedelta(seconds=access.connect_s),
        "read_timeout": datetime.timedelta(seconds=access.read_s),
        "timeout": datetime.timedelta(seconds=timeout_s) if timeout_s else _FOREVER,
        "proxy_url": _NOWHERE,
        "proxy_excludes": urlsplit(access.url).hostname or "",
        "http1_only": True,
    }
    if not is_plain:
        with open(access.ca_path, "rb") as file:
            client["root_certificate"] = file.read()
    config = {
        "aws_endpoint_url_s3": access.url,
        "virtual_hosted_style_request": True,  # the URL has the bucket, wherever it is there
        "region": access.region or "us-east-1",
        "skip_signature": access.credentials is None,
        "s3_express": False,
        "request_payer": False,
        "unsigned_payload": False,
    }
    return S3Store(
        "bucket",
        config=config,
        client_options=client,
        retry_config={"max_retries": 0},
        credential_provider=_Credentials(access),
    )


class _Credentials:
    """Gives obstore the credentials: given as options, they would be mixed with environment variables."""

    def __init__(self, access: Access) -> None:
        self._access = access

    def __call__(self) -> dict[str, Any]:
        key, secret, token = self._access.credentials or ("", "", None)
        return {"access_key_id": key, "secret_access_key": secret, "token": token, "expires_at": None}
