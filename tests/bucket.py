"""A stand-in for Google Cloud Storage: buckets in this process's memory, behind the parts of its JSON API in use.

gcsfs, google-cloud-storage, TensorStore and array_record find it by the variables that :func:`stand_in` sets. Nothing
leaves the machine.
"""

import contextlib
import json
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


class Buckets(ThreadingHTTPServer):
    """Objects by bucket and name, and what was asked for."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *names: str):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, dict[str, bytes]] = {name: {} for name in names}
        self.asked: list[str] = []
        """``METHOD bucket/object`` of everything that was written or deleted, in order."""
        self.read: list[str] = []
        """``bucket/object`` of everything of which bytes were read, in order."""
        self.lock = threading.Lock()
        self.generations: dict[tuple[str, str], int] = {}
        self.uploads: list[tuple[str, str, bytearray]] = []
        self.count = 0

    def handle_error(self, *_: Any) -> None:
        """Clients that ask twice hang up on what comes second."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def put(self, bucket: str, name: str, data: bytes) -> dict[str, Any]:
        self.count += 1
        self.objects[bucket][name] = data
        self.generations[bucket, name] = self.count
        self.asked.append(f"PUT {bucket}/{name}")
        return self.described(bucket, name)

    def described(self, bucket: str, name: str) -> dict[str, Any]:
        time = "2026-01-01T00:00:00.000Z"
        generation = str(self.generations[bucket, name])
        return {
            "kind": "storage#object",
            "id": f"{bucket}/{name}/{generation}",
            "name": name,
            "bucket": bucket,
            "generation": generation,
            "metageneration": "1",
            "size": str(len(self.objects[bucket][name])),
            "timeCreated": time,
            "updated": time,
        }


class _Handler(BaseHTTPRequestHandler):
    server: Buckets
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: Any) -> None:
        pass

    def _handle(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = [urllib.parse.unquote(part) for part in url.path.split("/")]
        with self.server.lock:
            self._reply(parts[parts.index("b") + 1 :] if "b" in parts else parts, "upload" in parts, query, body)

    def do_GET(self) -> None:
        self._handle()

    do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815

    def _send(self, status: int, content: Any = b"", headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data)

    def _fail(self, status: int, words: str) -> None:
        self._send(status, {"error": {"code": status, "message": words, "errors": []}})

    def _reply(self, parts: list[str], upload: bool, query: dict[str, str], body: bytes) -> None:
        server = self.server
        if parts and parts[0] == "session":
            return self._chunk(int(parts[1]), body)
        bucket, *rest = parts
        if bucket == "private":
            return self._fail(401, "Anonymous caller does not have storage.buckets.get access")
        if bucket == "objects" and not rest:
            return self._fail(403, "nobody does not have storage.buckets.get access to the bucket.")
        if bucket not in server.objects:
            return self._fail(404, "The specified bucket does not exist.")
        objects = server.objects[bucket]
        match self.command, rest:
            case "GET", []:
                self._send(200, {"kind": "storage#bucket", "name": bucket, "id": bucket, "location": "HERE"})
            case "GET", ["o"]:
                self._send(200, _listed(server, bucket, query))
            case "POST", ["o"] if upload:
                self._upload(bucket, query, body)
            case _, ["o", name, *_] if name not in objects:
                self._fail(404, f"No such object: {bucket}/{name}")
            case "GET", ["o", name] if query.get("alt") == "media":
                self._download(bucket, name, query)
            case "GET", ["o", name]:
                self._send(200, server.described(bucket, name))
            case "DELETE", ["o", name]:
                del objects[name]
                server.asked.append(f"DELETE {bucket}/{name}")
                self._send(204)
            case "POST", ["o", name, "rewriteTo", "b", other, "o", new]:
                made = server.put(other, new, objects[name])
                self._send(200, {"kind": "storage#rewriteResponse", "done": True, "resource": made})
            case _:
                self._fail(400, f"The stand-in does not know {self.command} {self.path}")

    def _download(self, bucket: str, name: str, query: dict[str, str]) -> None:
        data, generation = self.server.objects[bucket][name], str(self.server.generations[bucket, name])
        self.server.read.append(f"{bucket}/{name}")
        if query.get("ifGenerationNotMatch") == generation:
            return self._send(304)
        if query.get("ifGenerationMatch", generation) != generation:
            return self._fail(412, "conditionNotMet")
        headers = {"x-goog-generation": generation, "x-goog-stored-content-length": str(len(data))}
        if not (ranged := self.headers.get("Range")):
            return self._send(200, data, headers)
        first, _, last = ranged.removeprefix("bytes=").partition("-")
        start = int(first) if first else max(len(data) - int(last), 0)
        end = min(int(last) + 1, len(data)) if first and last else len(data)
        if start >= len(data):
            return self._fail(416, "the range is not satisfiable")
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        self._send(206, data[start:end], headers)

    def _upload(self, bucket: str, query: dict[str, str], body: bytes) -> None:
        server, name = self.server, query.get("name", "")
        if query["uploadType"] == "multipart":
            boundary = self.headers["Content-Type"].partition("boundary=")[2].strip('"').encode()
            _, said, content = body.split(b"--" + boundary, 2)
            name = name or json.loads(said.replace(b"\r\n", b"\n").split(b"\n\n", 1)[1])["name"]
            content = content.rpartition(b"--" + boundary + b"--")[0]
            separator = b"\r\n\r\n" if b"\r\n\r\n" in content[:200] else b"\n\n"
            body = content.split(separator, 1)[1].removesuffix(b"\n").removesuffix(b"\r")
        wanted = query.get("ifGenerationMatch")
        known = str(server.generations[bucket, name]) if name in server.objects[bucket] else "0"
        if wanted is not None and wanted != known:
            return self._fail(412, "conditionNotMet")
        if query["uploadType"] != "resumable":
            return self._send(200, server.put(bucket, name, body))
        server.uploads.append((bucket, name or json.loads(body)["name"], bytearray()))
        self._send(200, b"", {"Location": f"{server.url}/upload/session/b/session/{len(server.uploads) - 1}"})

    def _chunk(self, number: int, body: bytes) -> None:
        bucket, name, data = self.server.uploads[number]
        data += body
        if self.headers.get("Content-Range", "").endswith("/*"):
            return self._send(308, b"", {"Range": f"bytes=0-{len(data) - 1}"})
        self._send(200, self.server.put(bucket, name, bytes(data)))


def _listed(server: Buckets, bucket: str, query: dict[str, str]) -> dict[str, Any]:
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
    items, prefixes = [], set()
    for name in sorted(server.objects[bucket]):
        if not name.startswith(prefix) or not query.get("startOffset", "") <= name < query.get(
            "endOffset", "\U0010ffff"
        ):
            continue
        inner, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
        if found:
            prefixes.add(prefix + inner + found)
        else:
            items.append(server.described(bucket, name))
    return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}


@contextlib.contextmanager
def stand_in(*names: str) -> Iterator[Buckets]:
    """Buckets of these names, for this process and those that it starts."""
    with Buckets(*names) as server, pytest.MonkeyPatch.context() as patch:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        patch.setenv("STORAGE_EMULATOR_HOST", server.url)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", server.url)
        patch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", server.url)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "nobody")
        # gcsfs would ask Google for credentials, and by gRPC of what kind a bucket is.
        patch.setenv("NO_GCE_CHECK", "true")
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        yield server
        server.shutdown()
