"""A server on this machine that answers every request with bytes that were prepared, valid HTTP or not."""

import contextlib
import re
import socketserver
import threading
from types import TracebackType

_MOST_REQUEST_BYTES = 1 << 16
_MOST_BYTES = 3 << 29  # of an answer that goes on: more than a reader may keep in memory


class AnswerServer(contextlib.AbstractContextManager[str]):
    """A context with a server; its value is the server's address, host:port.

    Content that announces more bytes than it has, or no number, goes on with zeros until the client hangs up. A listing
    does not: clients of S3 read it whole, and the endpoint is the user's choice.

    Args:
        listing: the answer to requests for a listing of S3 (`list-type` in the query): head and body.
        content: the answer to all other requests. A request with HEAD gets its head alone.
        port: port of the server; 0 for any free one.
    """

    def __init__(self, listing: bytes, content: bytes, port: int = 0) -> None:
        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with contextlib.suppress(OSError):  # the client has seen enough
                    self.request.settimeout(5)
                    request = b""
                    while b"\r\n\r\n" not in request and len(request) < _MOST_REQUEST_BYTES:
                        if not (data := self.request.recv(4096)):
                            return
                        request += data
                    is_listing = b"list-type" in request.partition(b"\r\n")[0]
                    answer = listing if is_listing else content
                    answer = _part_of(answer, request)
                    if request.startswith(b"HEAD"):
                        head, end, _ = answer.partition(b"\r\n\r\n")
                        answer = head + end
                    self.request.sendall(answer)
                    for _ in range(0 if is_listing else _missing(answer) >> 20):
                        self.request.sendall(bytes(1 << 20))

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads, allow_reuse_address = True, True

        self._server = Server(("127.0.0.1", port), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> str:
        self._thread.start()
        host, port = self._server.server_address[:2]
        return f"{host!s}:{port}"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _part_of(answer: bytes, request: bytes) -> bytes:
    """Return the bytes that the request asks for, if it asks for a part and the head of the answer is undamaged."""
    head, end, body = answer.partition(b"\r\n\r\n")
    wanted = re.search(rb"\r\nrange: bytes=(\d+)-(\d*)\r\n", request, re.IGNORECASE)
    length = b"Content-Length: %d\r\n" % len(body)
    if not wanted or not head.startswith(b"HTTP/1.1 200") or length not in head:
        return answer
    first = int(wanted[1])
    part = body[first : int(wanted[2]) + 1 if wanted[2] else None]
    where = b"Content-Length: %d\r\nContent-Range: bytes %d-%d/%d\r\n" % (
        len(part), first, first + len(part) - 1, len(body),
    )  # fmt: skip
    return head.replace(b"200 OK", b"206 Partial Content").replace(length, where) + end + part


def _missing(answer: bytes) -> int:
    """Return how many bytes an answer lacks, by its head."""
    head, end, body = answer.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 2") or not body:
        return 0
    length = re.search(rb"\r\ncontent-length: *(\d{1,18})\r\n", head + b"\r\n", re.IGNORECASE)
    return min(int(length[1]) - len(body) if length else _MOST_BYTES, _MOST_BYTES)
