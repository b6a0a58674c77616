"""A small server of chat completions on this machine, which answers well, late, wrongly, or not at all."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Reply:
    """What the server does with a question.

    Attributes:
      text: of the answer, in the form of a chat completion.
      body: the whole body in place of that.
      status: of the response.
      headers: further ones.
      delay: seconds before it.
      is_cut: the answer ends at the limit of tokens.
      is_metered: the answer counts its tokens, 11 in and 3 out.
      hangs_up: the connection is closed without a response.
    """

    text: str | None = "Score: 7"
    body: bytes | None = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    is_cut: bool = False
    is_metered: bool = True
    hangs_up: bool = False

    def content(self) -> bytes:
        """The body of the response."""
        if self.body is not None:
            return self.body
        message = {"role": "assistant", "content": self.text}
        fields: dict[str, Any] = {
            "choices": [{"message": message, "finish_reason": "length" if self.is_cut else "stop"}]
        }
        if self.is_metered:
            fields["usage"] = {"prompt_tokens": 11, "completion_tokens": 3}
        return json.dumps(fields).encode()


@dataclass
class ChatServer:
    """A server that runs.

    Attributes:
      reply: the number of a call, from 0, and its question to what is done with it.
      models: that it lists; None where it has no list.
      key: that requests must have.
      port: of this machine.
      questions: the last message of every chat that came, in their order.
      requests: the bodies of all chats that came.
      most_at_once: calls that were under way at the same time.
    """

    reply: Callable[[int, str], Reply] = lambda number, question: Reply()
    models: list[str] | None = field(default_factory=lambda: ["judge"])
    key: str | None = None
    port: int = 0
    questions: list[str] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    most_at_once: int = 0
    _at_once: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _closed: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        """What the config takes."""
        return f"http://127.0.0.1:{self.port}/v1"

    def answer(self, fields: dict[str, Any]) -> Reply:
        """The reply to a request, after its delay."""
        if "messages" not in fields:
            return Reply(status=400, body=b'{"error": "messages are missing"}')
        question = fields["messages"][-1]["content"]
        with self._lock:
            number = len(self.questions)
            self.questions.append(question)
            self.requests.append(fields)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            reply = self.reply(number, question)
            self._closed.wait(reply.delay)
            return reply
        finally:
            with self._lock:
                self._at_once -= 1


@contextmanager
def closed_url() -> Iterator[str]:
    """An address of this machine where nothing listens, and no other process can."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}/v1"


@contextmanager
def serving(server: ChatServer) -> Iterator[ChatServer]:
    """Run a server; on the port that it has, else on a free one."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self.path != "/v1/models" or server.models is None:
                self._send(Reply(status=404, body=b"no such page"))
            else:
                self._send(Reply(body=json.dumps({"data": [{"id": name} for name in server.models]}).encode()))

        def do_POST(self) -> None:
            fields = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != "/v1/chat/completions":
                self._send(Reply(status=404, body=b"no such page"))
            elif server.key is not None and self.headers.get("Authorization") != f"Bearer {server.key}":
                words = f"wrong key {self.headers.get('Authorization')}"
                self._send(Reply(status=401, body=words.encode()))
            else:
                self._send(server.answer(fields))

        def _send(self, reply: Reply) -> None:
            if reply.hangs_up:
                self.close_connection = True
                return
            content = reply.content()
            try:
                self.send_response(reply.status)
                for name, value in {"Content-Length": str(len(content)), **reply.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)
            except OSError:  # the client has gone
                self.close_connection = True

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # a client that was killed

    with Server(("127.0.0.1", server.port), Handler) as http:
        server.port = http.server_address[1]
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server._closed.set()
            http.shutdown()
            thread.join()
            server._closed.clear()
