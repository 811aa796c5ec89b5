"""The demo under attack: raw HTTP against the real page, from foreign pages and from programs."""

import asyncio
import base64
import http.client
import io
import json
import math
import re
import signal
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from PIL import Image
from processes import Maelab, Process

from maelab.demo.guard import Guard

pytestmark = pytest.mark.skipif(find_spec("gradio") is None, reason="gradio is not installed")

SECRET = "none but its owner may read this"


@dataclass
class Answer:
    status: int
    headers: list[tuple[str, str]]
    body: bytes


@dataclass
class Page:
    """The demo, served with the weights that maelab ships."""

    port: int
    temp: Path
    process: Process

    def ask(self, method: str, path: str, body: bytes | None = None, *headers: tuple[str, str]) -> Answer:
        """One request with these headers only, but for Host (if none is given) and the body's length."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        own = any(name.lower() == "host" for name, _ in headers)
        connection.putrequest(method, path, skip_host=own, skip_accept_encoding=True)
        for name, value in (*headers, *([("Content-Length", str(len(body)))] if body is not None else [])):
            connection.putheader(name, value)
        connection.endheaders(body)
        response = connection.getresponse()
        try:
            content = response.read()
        except http.client.IncompleteRead as error:
            content = error.partial
        connection.close()
        return Answer(response.status, response.getheaders(), content)

    def join(self, body: bytes) -> Answer:
        return self.ask("POST", "/gradio_api/queue/join", body, ("Content-Type", "application/json"))

    def event(self, number: int, data: Any, sent: Any = None, **more: Any) -> Answer:
        """Whether an event is taken."""
        body = {"data": data, "event_data": sent, "fn_index": number, "trigger_id": None, "session_hash": "attack"}
        return self.join(json.dumps(body | more).encode())

    def told(self) -> str:
        """Everything that the page is told of the events that were taken."""
        return self.ask("GET", "/gradio_api/queue/data?session_hash=attack").body.decode()

    def events(self) -> list[tuple[int, list[Any], bool]]:
        """Every event that the page says it has: its number, values as the page would send them, and whether a script
        of ours sends it, with data of its own."""
        html = self.ask("GET", "/").body.decode()
        config, _ = json.JSONDecoder().raw_decode(html.split("window.gradio_config = ", 1)[1])
        values = {part["id"]: part["props"].get("value") for part in config["components"]}
        events = []
        for event in config["dependencies"]:
            ours = any(name not in ("change", "click") for _, name in event["targets"])
            events.append((event["id"], [values[part] for part in event["inputs"]], ours))
        assert len(events) >= 10 and sum(ours for *_, ours in events) == 5, events
        return events

    def raw(self, request: bytes) -> bytes:
        """What comes back for these bytes, to the end; nothing if the server hangs up first."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=600) as connection:
            try:
                connection.sendall(request)
                connection.shutdown(socket.SHUT_WR)
                return b"".join(iter(lambda: connection.recv(1 << 16), b""))
            except (ConnectionError, BrokenPipeError):
                return b""

    def lives(self) -> None:
        """It answers, and it has printed no traceback."""
        assert self.ask("GET", "/theme.css").status == 200
        assert "Traceback" not in self.process.err.read_text()


@pytest.fixture(scope="module")
def page(maelab: Maelab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    temp = tmp_path_factory.mktemp("temp")
    server = maelab.start("demo", "--port", 0, cwd=tmp_path_factory.mktemp("demo"), temp=str(temp))
    server.wait_for(server.out)
    yield Page(int(server.out.read_text().split()[0].rstrip("/").rpartition(":")[2]), temp, server)
    server.signal(signal.SIGINT)
    ended = server.wait()
    assert ended.status == 0 and "Traceback" not in ended.err, ended
    assert list(temp.iterdir()) == []


@pytest.fixture
def elsewhere() -> Iterator[tuple[str, list[str]]]:
    """The address of another server on this machine, and the paths that it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/secret.png", asked
        server.shutdown()
        thread.join()


# -------------------------------------------------------------------------------------------------------------- files


def test_no_event_gives_away_a_file_or_asks_another_server(page, elsewhere, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text(SECRET)
    secret.chmod(0o600)
    address, asked = elsewhere
    kind = {"meta": {"_type": "gradio.FileData"}}
    forms = [
        {"path": str(secret), **kind},
        {"path": str(secret)},
        {"path": str(secret), "url": f"/gradio_api/file={secret}", "is_stream": True, **kind},
        {"url": f"file://{secret}"},
        {"url": address, "path": address, **kind},
        {"url": address},
    ]
    answers = []
    for number, data, _ in page.events():
        for form in forms:
            for value in (form, [{"value": form, "__type__": "update"}]):
                for place in range(len(data)):
                    answers.append(page.event(number, [*data[:place], value, *data[place + 1 :]]))
                sent = [value, {"index": value}, {"content": value, "name": "x"}, {"mask": value}, {"ink": value}]
                answers += [page.event(number, data, each) for each in sent]
            tricks = ({"session_hash": form}, {"event_id": form}, {"state": form}, {"trigger_id": form})
            answers += [page.event(number, data, **trick) for trick in tricks]
            answers.append(page.event(number, [*data, form]))
        if any(answer.status == 200 for answer in answers):
            answers.append(Answer(200, [], page.told().encode()))
    texts = [answer.body.decode() for answer in answers]
    copies = {found for text in texts for found in re.findall(r"/[^'\"\s]*secret\.txt", text)}
    copies |= {str(file) for file in page.temp.rglob("*") if file.is_file()} | {str(secret)}
    routes = ("/gradio_api/file=", "/file=", "/gradio_api/file", "/gradio_api/stream/")
    answers += [page.ask("GET", route + quote(copy)) for copy in sorted(copies) for route in routes]
    answers += [page.ask("GET", f"/gradio_api/{way}={address}") for way in ("proxy", "file")]
    assert not [answer for answer in answers if SECRET in answer.body.decode()]
    assert asked == []
    assert [file for file in page.temp.rglob("*") if file.is_file()] == []
    assert {answer.status for answer in answers} == {400, 404}
    assert not [text for text in texts if str(tmp_path) in text or str(page.temp) in text]
    page.lives()


OTHER_PATHS = [
    "openapi.json", "docs", "redoc", "config", "monitoring", "login", "svelte/x", "manifest.json", "pwa_icon",
    *(f"gradio_api/{name}" for name in (
        "info", "openapi.json", "startup-events", "token", "deep_link", "upload_progress?upload_id=1", "call/x/y",
        "custom_component/x/client/y/z", "vibe-code", "heartbeat/a/b", "queue/data/", "/queue/data", "runs",
    )),
    "static/img/logo.svg", "assets/..%2f..%2f..%2froutes.py", "static/js/../../routes.py", "assets//etc/passwd",
]  # fmt: skip


def test_only_the_paths_of_the_page_are_served(page):
    assert [path for path in OTHER_PATHS if page.ask("GET", f"/{path}").status != 404] == []


def test_nothing_but_events_can_be_sent(page):
    for path in (
        "upload",
        "component_server",
        "reset",
        "cancel",
        "run/draw",
        "api/draw",
        "call/draw",
        "stream/x",
        "login",
    ):
        for method in ("POST", "PUT"):
            answer = page.ask(method, f"/gradio_api/{path}", b"{}", ("Content-Type", "application/json"))
            assert answer.status == 404, path
    assert page.ask("DELETE", "/").status == 404
    page.lives()


# -------------------------------------------------------------------------------------------------- hosts and origins

LOOPBACK = ["localhost", "LOCALHOST:1", "127.0.0.1", "127.0.0.1:7860", "127.9.9.9:80", "[::1]", "[::1]:7860"]
FOREIGN = [
    "evil.example", "evil.example:7860", "localhost.evil.example", "127.0.0.1.evil.example", "localhost:80:80", "",
    "evil@localhost", "[::1", "::1", "localhost.", "localhost evil.example", "127.1", "192.0.2.1", "0.0.0.0", "[::]",
]  # fmt: skip


def test_foreign_hosts_and_origins_are_refused(page):
    for host in LOOPBACK:
        assert page.ask("GET", "/theme.css", None, ("Host", host)).status == 200, host
    for host in FOREIGN:
        answer = page.ask("GET", "/", None, ("Host", host))
        assert answer.status == 403 and b"evil" not in answer.body, host
    assert page.ask("GET", "/", None, ("Host", "localhost"), ("Host", "evil.example")).status in (400, 403)
    assert b" 403 " in page.raw(b"GET / HTTP/1.0\r\n\r\n").partition(b"\r\n")[0]
    own = f"127.0.0.1:{page.port}"
    for origin in (
        "http://evil.example",
        "null",
        f"https://{own}",
        "http://127.0.0.1:1",
        f"http://localhost:{page.port}",
    ):
        for method, path in (("GET", "/"), ("POST", "/gradio_api/queue/join"), ("OPTIONS", "/gradio_api/queue/join")):
            more = ("Origin", origin), ("Access-Control-Request-Method", "POST")
            answer = page.ask(method, path, None, *more)
            assert answer.status == 403, (origin, method)
            assert not [name for name, _ in answer.headers if name.lower().startswith("access-control")]
    answer = page.ask("GET", "/", None, ("Origin", f"http://{own}"))
    assert answer.status == 200 and not [name for name, _ in answer.headers if "access-control" in name.lower()]


def test_what_headers_say_of_proxies_is_ignored(page):
    evil = "evil.example"
    names = ("X-Forwarded-Host", "X-Forwarded-Server", "X-Forwarded-Prefix", "X-Gradio-Server", "Referer")
    more = *((name, f"http://{evil}/") for name in names), ("Forwarded", f"host={evil};proto=https")
    for each in (*more, ("X-Forwarded-Host", evil), ("X-Forwarded-Proto", "https"), ("X-Forwarded-For", evil)):
        answer = page.ask("GET", "/", None, each)
        assert answer.status == 200 and f"http://127.0.0.1:{page.port}" in answer.body.decode(), each
        assert evil not in answer.body.decode() + str(answer.headers) and "https://127" not in answer.body.decode(), (
            each
        )


def _passes(guard: Guard, host: str) -> bool:
    """Whether a guard lets a request for this host inside."""
    asked = []

    async def inner(scope: Any, *_: Any) -> None:
        asked.append(scope["path"])

    async def nothing(*_: Any) -> Any:
        return {}

    scope = {"type": "http", "method": "GET", "path": "/", "query_string": b"", "headers": [(b"host", host.encode())]}
    guard.inner = inner
    asyncio.run(guard(scope, nothing, nothing))
    return asked == ["/"]


@pytest.mark.parametrize(
    ("host", "address", "more"),
    [
        ("127.0.0.1", "127.0.0.1", []),
        ("MyBox.lan", "192.0.2.7", ["mybox.lan", "MYBOX.LAN:7860", "192.0.2.7:7860"]),
        ("192.0.2.7", "192.0.2.7", ["192.0.2.7"]),
        ("2001:db8::7", "2001:db8::7", ["[2001:db8::7]:7860"]),
        ("0.0.0.0", "0.0.0.0", ["0.0.0.0:7860", "192.0.2.1", "[2001:db8::1]:80", "[::]", socket.gethostname()]),
        ("::", "::", ["192.0.2.1", "0.0.0.0", "[2001:db8::1]", "[::]", socket.gethostname()]),
    ],
)
def test_hosts_follow_where_the_server_listens(host, address, more):
    guard = Guard(None, {}, host, address)  # type: ignore[arg-type]
    assert [name for name in [*LOOPBACK, *more] if not _passes(guard, name)] == []
    assert [name for name in [*FOREIGN, "198.51.100.1"] if _passes(guard, name) and not guard.everywhere] == []
    assert [name for name in FOREIGN[:11] if _passes(guard, name)] == []


# ------------------------------------------------------------------------------------------------------- odd requests


def test_a_bodys_length_is_what_arrives(page):
    head = b"POST /gradio_api/queue/join HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    for length in (b"abc", b"-1", b"1e3", b"", b"9" * 30, b"5\r\nContent-Length: 6", b"+5", b"0x5"):
        answer = page.raw(head + b"Content-Length: " + length + b"\r\n\r\n{}")
        assert answer[:12] in (b"", b"HTTP/1.1 400", b"HTTP/1.1 413"), (length, answer)
    chunk = b"%x\r\n" % (1 << 20) + b"x" * (1 << 20) + b"\r\n"
    answer = page.raw(head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 16 + b"0\r\n\r\n")
    assert answer[:12] in (b"", b"HTTP/1.1 413")
    answer = page.raw(head + b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n" + chunk * 16 + b"0\r\n\r\n")
    assert answer[:12] in (b"", b"HTTP/1.1 400", b"HTTP/1.1 413")
    answer = page.raw(head + b"Content-Length: 2\r\nConnection: close\r\n\r\n{}" + b"x" * (16 << 20))
    assert answer[:12] in (b"", b"HTTP/1.1 400")
    assert page.join(b"x" * (15 << 20)).status == 413
    page.lives()


def test_a_body_that_breaks_the_protocol_on_its_way_ends_without_a_traceback(page):
    """The server has answered it by the time that the page would refuse the path or the host, and takes no answer."""
    bodies = (b"ZZ\r\n", b"2\r\n{}ZZ", b"2\r\n{}\r\n-1\r\n")
    for path, host in ((b"queue/join", b"localhost"), (b"upload", b"localhost"), (b"queue/join", b"evil.example")):
        head = b"POST /gradio_api/" + path + b" HTTP/1.1\r\nHost: " + host + b"\r\nTransfer-Encoding: chunked\r\n\r\n"
        for body in bodies:
            assert page.raw(head + body)[:12] in (b"", b"HTTP/1.1 400"), (path, host, body)
    page.lives()


def test_a_session_that_has_ended_is_said_without_a_traceback(page):
    assert page.ask("GET", "/gradio_api/queue/data?session_hash=unknown").status in (200, 404)
    assert page.ask("GET", "/gradio_api/queue/data").status == 422
    page.lives()


def test_events_that_are_none_are_refused(page):
    number, data, _ = page.events()[0]
    good = {"data": data, "fn_index": number, "session_hash": "attack"}
    deep = "[" * 10**5
    bodies = [b"", b"{", b"[]", b"null", b"\xff", b"1", f'{{"data":{deep}'.encode(), (deep + "]" * 10**5).encode()]
    bodies += [json.dumps(good).replace('"attack"', '"\\ud800"').encode(), b'{"a":' * 10**5 + b"1" + b"}" * 10**5]
    for change in (
        {"fn_index": 10**6}, {"fn_index": -1}, {"fn_index": None}, {"fn_index": True}, {"fn_index": "0"},
        {"data": None}, {"data": [*data, 1]}, {"data": {}}, {"data": "x"}, {"trigger_id": "x"}, {"trigger_id": 1.5},
        {"session_hash": None}, {"session_hash": "x" * 10**5}, {"session_hash": "../x"},
        {"event_data": {"unknown": 1}}, {"event_data": {"ink": math.nan}}, {"event_data": {"ink": [1]}},
        {"event_data": [1]}, {"event_data": {"ink": "\ud800"}},
        {"batched": True}, {"simple_format": True}, {"event_id": "x"}, {"oauth_token": "x"},
    ):  # fmt: skip
        bodies.append(json.dumps(good | change).encode())
    for body in bodies:
        answer = page.join(body)
        assert answer.status == 400 and len(answer.body) < 100, body[:200]
    page.lives()


def _picture(width: int, height: int) -> str:
    """A tiny file that says it has this size."""
    file = io.BytesIO()
    Image.new("1", (1, 1)).save(file, "BMP")
    content = bytearray(file.getvalue())
    content[18:26] = struct.pack("<ii", width, height)
    return base64.b64encode(content).decode()


def test_every_event_answers_hostile_values_with_a_short_word(page):
    huge = int("9" * 4000)
    odd = [math.nan, math.inf, 1e308, huge, -1, None, "inf", "<script>" * 1000]
    sent = [None, {}, {"index": -1}, {"index": -2}, {"index": 20}, {"index": huge}, {"index": True}, {"index": 0.5}]
    sent += [{"index": "0"}, {"mask": "1"}, {"mask": "2" * 49}, {"mask": 1}, {"ink": "AAAA"}, {"ink": "é"}, {"ink": 1}]
    sent += [
        {"ink": "A" * 10**6},
        {"content": 1},
        {"content": "é", "name": 1},
        {"content": "AAAA", "name": "\0" * 10**5},
    ]
    sent += [{"content": _picture(20_000, 10_000)}, {"content": _picture(8000, 8000)}, {"name": None, "size": -1}]
    taken = 0
    for number, data, ours in page.events():
        hostile = [(i, value) for i, usual in enumerate(data) for value in (odd if usual is not None else ["state"])]
        events = [([*data[:i], value, *data[i + 1 :]], None) for i, value in hostile]
        for values, event_data in [*events, *((data, each) for each in (sent if ours else sent[:2]))]:
            answer = page.event(number, values, event_data)
            taken += answer.status == 200
            assert answer.status == 200 or (answer.status == 400 and len(answer.body) < 100), (
                values,
                event_data,
                answer,
            )
    said = page.told()
    done = [json.loads(line[6:]) for line in said.splitlines() if '"process_completed"' in line]
    assert taken > 100 and [message["success"] for message in done] == [True] * taken
    for word in (
        "such mask",
        "such image",
        "such model",
        "fit the model",
        "arrive whole",
        "89 megapixels",
        "nothing is drawn",
    ):
        assert word in said, word
    assert "<script>" not in said and "&lt;script" not in said
    page.lives()
