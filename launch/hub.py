"""A ViT's weights on the hub that timm takes them from: whether this machine has them, or can get them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from nsi.errors import UserError

_OLDER, _NEWER = "pytorch_model.bin", "model.safetensors"
_TOO_MANY, _ITS_OWN = 429, 500  # an answer, if not for now: too many ask; from 500 on the trouble is the hub's own


class Place(NamedTuple):
    """Where the hub has a model's weights."""

    repository: str
    revision: str | None
    files: tuple[str, ...]  # the first that is there counts


def place_of(name: str) -> Place | None:
    """Where the hub has a model's weights; None for one that has none, or has them from elsewhere.

    Raises UserError for a name that timm does not know.
    """
    from nsi.backbone import DCT  # needs torch, which `nsi doctor` waits for elsewhere

    if name == DCT:
        return None
    import timm  # takes seconds

    try:
        known = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    except RuntimeError:  # the tag after the dot
        known = None
    if not known:
        raise UserError(
            f"--backbone {name}: timm {timm.__version__} knows no such model (timm.list_models() lists them)"
        )
    repository, _, revision = (known.hf_hub_id or "").partition("@")
    return Place(repository, revision or None, _files(known.hf_hub_filename or _OLDER)) if repository else None


def _files(name: str) -> tuple[str, ...]:
    """Where there is the newer form of a file, timm takes that."""
    if not name.endswith(".bin"):
        return (name,)
    newer = name.replace(_OLDER, _NEWER) if name.endswith(_OLDER) else name.removesuffix(".bin") + ".safetensors"
    return newer, name


def cached(place: Place) -> Path | None:
    """The weights in what this account has fetched from the hub before."""
    from huggingface_hub import try_to_load_from_cache

    repository, revision, files = place
    found = (try_to_load_from_cache(repository, name, cache_dir=_cache(), revision=revision) for name in files)
    return next((Path(path) for path in found if isinstance(path, str)), None)


def weights_bytes(name: str) -> int:
    """The size of a model's weights in the cache; 0 where they are not there and the hub answers, or none are needed.

    Raises UserError where the hub does not answer, or refuses, and for a name that timm does not know.
    """
    place = place_of(name)
    if place is None:
        return 0
    if found := cached(place):
        return found.stat().st_size
    refusal = _refusal(place) and _refusal(place)  # once is no time
    if refusal:
        raise UserError(f"{missing(name)}, and the hub gives none ({refusal[:100]}); {remedy(name)}")
    return 0


def missing(name: str) -> str:
    """In words, that the cache does not have them."""
    return f"--backbone {name}: its weights are not in {_cache()}"


def remedy(name: str) -> str:
    """In words, what to do about it."""
    fetch = f"import timm; timm.create_model('{name}', pretrained=True)"
    return f'where there is internet run: python -c "{fetch}", or give --backbone_weights'


def _refusal(place: Place) -> str:
    """Why the hub does not give the weights; "" where it would. Nothing is fetched."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    try:
        get_hf_file_metadata(hf_hub_url(place.repository, place.files[0], revision=place.revision), timeout=5.0)
    except EntryNotFoundError:  # timm looks for the next of the files
        return ""
    except Exception as error:  # the client's own, its HTTP library's and the operating system's
        status = getattr(getattr(error, "response", None), "status_code", 0)
        if status == _TOO_MANY or status >= _ITS_OWN:  # training tries for longer
            return ""
        return next(iter(str(error).splitlines()), type(error).__name__)
    return ""


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)
