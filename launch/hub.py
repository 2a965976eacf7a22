"""A ViT's weights on the hub that timm takes them from: whether this machine has them, or can get them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from nsi.errors import UserError

_NAMES = "model.safetensors", "pytorch_model.bin"  # in the order in which timm looks for them


class Place(NamedTuple):
    """Where the hub has a model's weights."""

    repository: str
    files: tuple[str, ...]  # the first that is there counts


def place_of(name: str) -> Place | None:
    """Where the hub has a timm model's weights; None for a model that timm does not know, or has from elsewhere."""
    import timm

    known = timm.get_pretrained_cfg(name)  # None for "dct", too
    if not known or not known.hf_hub_id:
        return None
    return Place(known.hf_hub_id.split("@")[0], (known.hf_hub_filename,) if known.hf_hub_filename else _NAMES)


def cached(place: Place) -> Path | None:
    """The weights in what this account has fetched from the hub before."""
    from huggingface_hub import try_to_load_from_cache

    found = (try_to_load_from_cache(place.repository, name, cache_dir=_cache()) for name in place.files)
    return next((Path(path) for path in found if isinstance(path, str)), None)


def weights_bytes(name: str) -> int:
    """The size of a timm model's weights in the cache; 0 where they are not there, and the hub answers for them, or
    timm has them from elsewhere.

    Raises UserError where the hub does not answer, or refuses.
    """
    place = place_of(name)
    if place is None:
        return 0
    if found := cached(place):
        return found.stat().st_size
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    try:
        get_hf_file_metadata(hf_hub_url(place.repository, place.files[0]), timeout=5.0)
    except EntryNotFoundError:  # an answer, too: timm looks for the next of the files
        return 0
    except Exception as error:  # the client's own, its HTTP library's and the operating system's
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{missing(name)}, and the hub gives none ({reason[:100]}); {remedy(name)}") from None
    return 0


def missing(name: str) -> str:
    """In words, that the cache does not have them."""
    return f"--backbone {name}: its weights are not in {_cache()}"


def remedy(name: str) -> str:
    """In words, what to do about it."""
    fetch = f"import timm; timm.create_model('{name}', pretrained=True)"
    return f'where there is internet run: python -c "{fetch}", or give --backbone_weights'


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)
