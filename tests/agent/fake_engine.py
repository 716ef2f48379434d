"""A tiny engine for tests of supervision: misbehaves on demand. Standard library only.

    fake_engine.py PORT STARTS_FILE MODE

Appends its process id to STARTS_FILE at each start. MODE: `serve`, `serve-once` (ends with code 3 on its
first start only), `exit` (code 3, with last words), `mute` (alive, loading for ever), `held` (loading until
there is a file STARTS_FILE.loaded, then serves), `stubborn` (serves, ignores SIGTERM), `parent` (serves, and
has a child of its own), `elsewhere` (alive, but does not listen at all), `closing` (serves until it is asked
to GET /close, then listens no more, alive all the same), `open` (generates for any key).

Like older llama-servers, it lists its models to everybody.

A chat that asks for a stream is answered as its `user` says: `endless` (a word each 20 ms), `stall` (a word,
then nothing for as long as it lives, whoever leaves), `nap` (the same until somebody asks to GET /wake),
`torn` (a word and a half, then nothing); anything else in three words. GET /busy tells how many streams it
works on.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

WORD = b'data: {"choices": [{"delta": {"content": "word "}}]}\n\n'


class Handler(BaseHTTPRequestHandler):
    mode = "serve"
    starts = ""
    busy = 0
    awake = threading.Event()

    def answer(self, status: int, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        if self.path == "/close":
            self.answer(200, {})
            threading.Thread(target=stop_listening, args=(self.server,)).start()
        elif self.path == "/health":
            held = self.mode == "held" and not os.path.exists(f"{self.starts}.loaded")
            self.answer(503 if held or self.mode == "mute" else 200, {})
        elif self.path == "/wake":
            self.awake.set()
            self.answer(200, {})
        elif self.path == "/busy":
            self.answer(200, {"busy": Handler.busy})
        elif self.path == "/capacity":
            self.answer(200, {"tokens": 4096})
        elif self.path == "/v1/models":
            self.answer(200, {"data": [{"id": "fake", "context": 512}]})
        else:
            self.answer(404, {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = self.headers.get("Authorization")
        if self.mode != "open" and key != f"Bearer {os.environ.get('FAKE_KEY')}":
            self.answer(401, {})
            return
        if body.get("stream"):
            self.stream(body.get("user"))
            return
        self.answer(200, {"choices": [{"message": {"role": "assistant", "content": "o"}}]})

    def stream(self, user: str | None) -> None:
        """In HTTP/1.0, as the standard library does by itself: the connection's end is the answer's."""
        Handler.busy += 1
        try:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            self.wfile.write(WORD)
            if user == "torn":
                self.wfile.write(WORD[:20])
            if user in ("stall", "torn"):
                threading.Event().wait()
            if user == "nap":
                self.awake.wait()
            while user == "endless":
                time.sleep(0.02)
                self.wfile.write(WORD)
            self.wfile.write(WORD + WORD + b"data: [DONE]\n\n")
        except OSError:
            pass
        finally:
            Handler.busy -= 1

    def log_message(self, *_: object) -> None:
        pass


def stop_listening(server: object) -> None:
    assert isinstance(server, ThreadingHTTPServer)
    server.shutdown()
    server.server_close()


def main(port: int, starts: str, mode: str) -> None:
    with open(starts, "a", encoding="ascii") as file:
        file.write(f"{os.getpid()}\n")
    with open(starts, encoding="ascii") as file:
        first = len(file.readlines()) == 1
    if mode == "exit" or (mode == "serve-once" and first):
        print("the model file is broken", file=sys.stderr, flush=True)
        sys.exit(3)
    if mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if mode == "parent":
        with open(starts + ".child", "w", encoding="ascii") as file:
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            file.write(str(child.pid))
    if mode != "elsewhere":
        Handler.mode, Handler.starts = mode, starts
        ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
    while True:
        signal.pause()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
