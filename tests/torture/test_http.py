"""The demo's page under mutated requests, over a real socket: it lives on, and says nothing that it must not."""

import random

from engine import INPUTS, LONG, SEED, mutated, tell
from test_demo_attack import SECRET, Page, page, pytestmark  # noqa: F401 - the running page is a fixture

EVENT = (
    b'{"data": [null, 0.5, "x"], "event_data": {"ink": "AAAA"}, "fn_index": 0, "trigger_id": 1, "session_hash": "fuzz"}'
)
HEAD = b"POST /gradio_api/queue/join HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
SEEDS = [
    b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    b"GET /theme.css HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: */*\r\nConnection: close\r\n\r\n",
    b"GET /gradio_api/queue/data?session_hash=fuzz HTTP/1.0\r\nHost: localhost\r\n\r\n",
    HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(EVENT) + EVENT,
    HEAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n" % len(EVENT) + EVENT + b"\r\n0\r\n\r\n",
    b"GET /gradio_api/file=/etc/passwd HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
]
TOKENS = (
    b"\r\n",
    b"Host: evil\r\n",
    b"Content-Length: -1\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"..",
    b"%2e%2e/",
    b"file=",
    b"Origin: null\r\n",
    b"Expect: 100-continue\r\n",
    b"Upgrade: websocket\r\n",
    b"HTTP/9.9",
    b"\0",
    b"X: " + b"y" * 5000,
)
REQUESTS = max(100, INPUTS // 2)


def test_mutated_requests(page: Page, tmp_path):  # noqa: F811
    (tmp_path / "secret.txt").write_text(SECRET)
    kinds: dict[bytes, int] = {}
    for number in range(REQUESTS):
        request = mutated(random.Random(f"http {SEED} {number}"), SEEDS, (*TOKENS, str(tmp_path).encode()))
        answer = page.raw(request)
        kinds[answer[9:12]] = kinds.get(answer[9:12], 0) + 1
        assert answer[9:12] in (b"", b"200", b"400", b"403", b"404", b"413", b"422", b"100"), (
            SEED,
            number,
            request,
            answer[:300],
        )
        assert b"Traceback" not in answer and b"root:" not in answer and SECRET.encode() not in answer, (SEED, number)
        if LONG and number % 1000 == 999:
            tell(f"requests to the demo: {number + 1} of {REQUESTS}")
    assert len(kinds) > 2, kinds
    assert [file for file in page.temp.rglob("*") if file.is_file()] == []
    page.lives()
