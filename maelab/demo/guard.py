"""What stands before the page: it lets through what the page needs, as measured in a browser, and nothing else.

Gradio can do much that this page does not need: it takes files by their path or address, hands files out, forwards
requests, and believes what headers say of proxies. The guard lists what may pass, not what may not.
"""

import contextlib
import json
import logging
import re
import socket
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from ipaddress import ip_address
from typing import Any

UPLOAD_BYTES = 10 * 2**20
REQUEST_BYTES = UPLOAD_BYTES * 4 // 3 + 2**20  # an upload comes as base64

_EVENTS = "/gradio_api/queue/join"
_READ = re.compile(
    r"/(theme\.css|favicon\.ico|(assets|static/js)/[\w-]+(\.[\w-]+)*|gradio_api/(app_id|heartbeat/[\w-]{1,64}|queue/data))?",
    re.ASCII,
)
_QUERY = re.compile(rb"session_hash=[\w-]{1,64}")
_HOST = re.compile(r"(?:\[([\da-f:.]+)\]|([\w.-]+))(?::\d{1,5})?", re.ASCII | re.IGNORECASE)
_HEADERS = (b"host", b"accept", b"accept-encoding")  # of a request, as far as Gradio may see them
_FIELDS = {"data", "event_data", "fn_index", "trigger_id", "session_hash"}
_EVENT_DATA = {"ink", "index", "name", "content", "size", "mask"}  # what the page's own scripts send
_POLICY = {
    b"content-security-policy": b"default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'self'",
    b"referrer-policy": b"no-referrer",
    b"x-content-type-options": b"nosniff",
}

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]


class _Refused(Exception):
    def __init__(self, status: int, why: str) -> None:
        self.status, self.why = status, why


class Guard:
    """An ASGI application around another. It refuses foreign hosts and origins (403), paths that the page does not ask
    for (404), large bodies (413) and events that are none of the page's (400); a refused request never gets inside.

    Args:
        inner: the page's application.
        inputs: for each event's number, how many inputs it has.
        host: the host name or address that the server was told to listen on.
        address: the address that it listens on. If that is every address (0.0.0.0, ::), any number is a good host, as
            no foreign page can have a number for its name, and so is this machine's own name.
    """

    def __init__(self, inner: Callable[..., Awaitable[None]], inputs: Mapping[int, int], host: str, address: str):
        self.inner, self.inputs = inner, inputs
        self.everywhere = ip_address(address.partition("%")[0]).is_unspecified
        self.names = {"localhost", host.lower(), address}
        if self.everywhere:
            self.names.add(socket.gethostname().lower())

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.inner(scope, receive, send)
            return
        started = False

        async def send_with_policy(message: _Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message = {**message, "headers": [*message.get("headers", []), *_POLICY.items()]}
            await send(message)

        async def answer(status: int, why: str) -> None:
            headers = [(b"content-type", b"text/plain")]
            # A body that breaks the protocol on its way has been answered by the server itself: it takes no other word.
            with contextlib.suppress(Exception):
                if not started:
                    await send_with_policy({"type": "http.response.start", "status": status, "headers": headers})
                await send({"type": "http.response.body", "body": why.encode()})

        try:
            scope, receive = await self._checked(scope, receive)
            await self.inner(scope, receive, send_with_policy)
        except _Refused as refused:
            await answer(refused.status, refused.why)
        except Exception as error:  # Gradio raises when a page asks for a session that has ended
            logging.getLogger("uvicorn.error").warning("%s failed: %s", scope["path"], type(error).__name__)
            await answer(500, "" if started else "the server failed")

    async def _checked(self, scope: _Message, receive: _Receive) -> tuple[_Message, _Receive]:
        """The request as Gradio may see it. Raises _Refused."""
        given = [value.decode("latin-1").lower() for name, value in scope["headers"] if name == b"host"]
        if len(given) != 1 or not self._is_own(given[0]):
            raise _Refused(403, "maelab demo answers to localhost and to the value of --host only")
        origins = [value.lower() for name, value in scope["headers"] if name == b"origin"]
        if any(origin != b"http://" + given[0].encode() for origin in origins):
            raise _Refused(403, "maelab demo answers to its own page only")
        headers = [(name, value) for name, value in scope["headers"] if name in _HEADERS]
        inside = {**scope, "headers": headers, "query_string": b""}
        if scope["method"] == "POST" and scope["path"] == _EVENTS:
            body = self._event(await _read(receive))
            length = b"%d" % len(body)
            inside["headers"] = [*headers, (b"content-type", b"application/json"), (b"content-length", length)]
            return inside, _once(body, receive)
        if scope["method"] != "GET" or not _READ.fullmatch(scope["path"]):
            raise _Refused(404, "maelab demo has no such page")
        if _QUERY.fullmatch(scope["query_string"]):
            inside["query_string"] = scope["query_string"]
        return inside, receive

    def _is_own(self, header: str) -> bool:
        """Whether a Host header, in lower case, names this server."""
        match = _HOST.fullmatch(header)
        if match is None:
            return False
        name = match[1] or match[2]
        try:
            return name in self.names or ip_address(name).is_loopback or self.everywhere
        except ValueError:  # a name
            return False

    def _event(self, body: bytes) -> bytes:
        """An event, written anew. Its values are plain: text, numbers, nothing; so no value can refer to a file, by any
        form that Gradio knows. Raises _Refused."""
        try:
            event = json.loads(body)
            fn, data, sent = event["fn_index"], event["data"], event.get("event_data") or {}
            good = (
                event.keys() <= _FIELDS
                and type(fn) is int
                and isinstance(data, list)
                and len(data) == self.inputs.get(fn)
                and sent.keys() <= _EVENT_DATA
                and all(value is None or isinstance(value, str | int | float) for value in (*data, *sent.values()))
                and isinstance(event.get("trigger_id"), int | None)
                and re.fullmatch(r"[\w-]{1,64}", event["session_hash"], re.ASCII)
            )
            if good:  # neither NaN nor half a character can be written
                return json.dumps(event, allow_nan=False, ensure_ascii=False).encode()
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
            pass
        raise _Refused(400, "this is no event of the page; reload it")


async def _read(receive: _Receive) -> bytes:
    """A request's body, however its length is told. Raises _Refused."""
    body = bytearray()
    more = True
    while more:
        message = await receive()
        body += message.get("body", b"")
        if message["type"] == "http.disconnect" or len(body) > REQUEST_BYTES:
            raise _Refused(413, f"too large: at most {UPLOAD_BYTES >> 20} MB")
        more = message.get("more_body", False)
    return bytes(body)


def _once(body: bytes, receive: _Receive) -> _Receive:
    """Gives the body, then what else there is."""
    left = [body]

    async def next_message() -> _Message:
        return {"type": "http.request", "body": left.pop(), "more_body": False} if left else await receive()

    return next_message
