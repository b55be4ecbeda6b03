"""A store of S3 in this process whose answers a test writes, and which keeps the requests."""

import http.server
import re
import ssl
import threading
from dataclasses import dataclass, field


@dataclass
class Request:
    """A request: its method, path, headers by lower-case name, and the client that sent it, "obstore" or "s3fs"."""

    method: str
    path: str
    headers: dict[str, str]
    client: str


def refusal(status, code, message="on purpose"):
    """The answer of a store that refuses a request."""
    return status, {}, f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()


@dataclass
class StubStore:
    """A store with objects by path (`/bucket/key`).

    Attributes:
        fault: None, or a function of a Request that returns the answer of a fault (status, headers, body), the words
            "reset", "hang", "cut" (half of the body is sent) or "endless", or None for a true answer.
        requests: all requests, in order.
        hang_s: how long a request hangs.
        num_hanging: requests that hang.
        num_sent_bytes: of endless answers, which `stopped` when their reader had gone.
    """

    tls: tuple[str, str] | None = None
    host: str = "127.0.0.1"
    objects: dict = field(default_factory=dict)
    fault: object = None
    requests: list = field(default_factory=list)
    hang_s: float = 30
    num_hanging: int = 0
    num_sent_bytes: int = 0
    stopped: threading.Event = field(default_factory=threading.Event)

    def __enter__(self):
        store = self
        self.released = threading.Event()

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self):
                store._answer(self)

            do_GET = do_HEAD = do_PUT = do_POST = answer

            def log_message(self, *words):
                pass

        self.server = http.server.ThreadingHTTPServer((self.host, 0), Handler)
        self.server.daemon_threads = True
        if self.tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*self.tls)
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        self.url = f"{'https' if self.tls else 'http'}://{self.host}:{self.server.server_port}"
        return self

    def __exit__(self, *error):
        self.released.set()
        self.server.shutdown()
        self.server.server_close()

    def clients(self):
        """The clients of all requests since the last call."""
        clients = [request.client for request in self.requests]
        self.requests.clear()
        return clients

    def _answer(self, handler):
        headers = {name.lower(): value for name, value in handler.headers.items()}
        body = handler.rfile.read(int(headers.get("content-length", 0)))
        client = "obstore" if headers.get("user-agent", "").startswith("object_store") else "s3fs"
        request = Request(handler.command, handler.path, headers, client)
        self.requests.append(request)
        fault = self.fault and self.fault(request)
        if fault == "hang":
            self.num_hanging += 1
            self.released.wait(self.hang_s)
            self.num_hanging -= 1
        if fault in ("reset", "hang"):
            handler.close_connection = True
            return handler.connection.close()
        if fault == "endless":
            return self._send_for_ever(handler, request)
        status, more, content = fault if isinstance(fault, tuple) else self._serve(request, body)
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **more}.items():
            handler.send_header(name, value)
        handler.end_headers()
        if request.method != "HEAD":
            handler.wfile.write(content[: len(content) // 2] if fault == "cut" else content)
        if fault:
            handler.close_connection = True

    def _send_for_ever(self, handler, request):
        end = request.headers.get("range", "").partition("-")[2]
        handler.send_response(206 if end else 200)
        if end:
            handler.send_header("Content-Range", f"bytes 0-{end}/{int(end) + 1}")
        handler.send_header("Content-Length", str(1 << 40))
        handler.send_header("ETag", '"1"')
        handler.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        handler.end_headers()
        try:
            while not self.released.is_set():
                self.num_sent_bytes += handler.wfile.write(bytes(1 << 16))
        except OSError:
            self.stopped.set()
        handler.close_connection = True

    def _serve(self, request, body):
        path = request.path.partition("?")[0]
        if request.method == "PUT":
            self.objects[path] = body
            return 200, {"ETag": '"1"'}, b""
        if path not in self.objects:
            return refusal(404, "NoSuchKey")
        content = self.objects[path]
        facts = {"ETag": '"1"', "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("range", ""))
        if not found:
            return 200, facts, content
        start, end = int(found[1]), min(int(found[2]) + 1, len(content))
        if start >= len(content):
            return refusal(416, "InvalidRange")
        return 206, facts | {"Content-Range": f"bytes {start}-{end - 1}/{len(content)}"}, content[start:end]
