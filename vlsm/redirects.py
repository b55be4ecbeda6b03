"""Files by HTTP, with redirects that stay within the allowed places.

A server decides where a redirect leads. Without a check, it could lead a node to addresses that only the node reaches,
such as the service of a cloud that hands out credentials.
"""

from typing import Any

import aiohttp
import yarl

from vlsm.errors import RedirectError
from vlsm.http_files import BoundedHttpFiles
from vlsm.locations import may_redirect


class HttpFiles(BoundedHttpFiles):
    """Files by HTTP, within limits.

    Args:
        allow: places that a redirect may lead to, beside the host of the file; see `vlsm.locations.may_redirect`.
        options: of fsspec's class.
    """

    def __init__(self, allow: tuple[str, ...] = (), **options: Any) -> None:
        super().__init__(client_kwargs={"trace_configs": [_watch(allow)]}, **options)

    async def _info(self, url: str, **options: Any) -> Any:
        """Return the facts of a file. fsspec reports every failure as a missing file; a redirect says what it is."""
        try:
            return await super()._info(url, **options)
        except FileNotFoundError as error:
            if isinstance(error.__cause__, RedirectError):
                raise error.__cause__ from None
            raise


def _watch(allow: tuple[str, ...]) -> aiohttp.TraceConfig:
    """Return hooks for a session that raise a RedirectError before a redirect that is not allowed."""

    async def note_start(_: Any, context: Any, request: aiohttp.TraceRequestStartParams) -> None:
        context.first = request.url

    async def check_redirect(_: Any, context: Any, redirect: aiohttp.TraceRequestRedirectParams) -> None:
        location = redirect.response.headers.get("Location") or redirect.response.headers.get("URI")
        if location is None:
            return  # aiohttp follows nothing
        try:
            target = redirect.url.join(yarl.URL(location))
        except ValueError:
            return  # aiohttp refuses it
        if not may_redirect(str(context.first), str(target), allow):
            redirect.response.close()
            raise RedirectError(
                f"{_bare(context.first)} redirects to {_bare(target)}, which is not allowed; "
                "if it may be read, give that address, or add its folder to run.allow"
            )

    watch = aiohttp.TraceConfig()
    watch.on_request_start.append(note_start)
    watch.on_request_redirect.append(check_redirect)
    return watch


def _bare(url: yarl.URL) -> str:
    """Return a URL without its user, query and fragment, which may be secrets."""
    bare = url.with_query(None).with_fragment(None)
    return str(bare.with_user(None) if bare.host else bare)
