"""Load backbone weights of several naming schemes strictly, and return a receipt.

Four naming schemes are read: timm's, Facebook's ConvNeXt (`downsample_layers.0.0.weight`), torchvision's
ConvNeXt (`features.1.0.block.0.weight`), and Lightning's (any of them under a prefix such as `model.backbone.`).
A missing or unexpected backbone tensor is an error that names it, so that weights never fail to load unnoticed. Only a
classifier is left out; the receipt counts its tensors.
"""

import hashlib
import json
import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import timm
import torch
from torch import nn

from ..config import TrainConfig
from ..data.preprocessing import Preprocessing
from ..errors import WeightsError
from ..files import printable
from .checkpoint import read_tensors

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Receipt:
    """What was loaded into a backbone. `str` gives one line for messages and logs."""

    source: str
    naming: str  # the naming scheme of the source
    loaded: int  # tensors
    left_out: int  # tensors of a classifier
    sha256: str  # of the file; of the tensors where there is none

    def __str__(self) -> str:
        rest = f", {self.left_out} classifier tensors left out" if self.left_out else ""
        return (
            f"backbone {self.loaded}/{self.loaded} tensors, {self.naming} -> timm names{rest}, "
            f"sha256 {self.sha256[:12]}, from {self.source}"
        )


def load_pretrained(backbone: nn.Module, config: TrainConfig) -> Receipt:
    """Load the pretrained weights that `config` names into `backbone`: from its file, else from timm's hub.

    Raises WeightsError.
    """
    path, default = config.pretrained_path, TrainConfig.pretrained_path
    # The default file holds weights of ConvNeXt-Tiny; for other backbones it is ignored.
    if path != default or (config.backbone == TrainConfig.backbone and Path(path).exists()):
        return load_file(backbone, config.backbone, path)
    name = published_name(config.backbone)
    ways = "give a file with --pretrained-path, or start from random weights with --no-pretrained"
    return load_from_hub(backbone, name, ways)


def published_name(backbone: str) -> str:
    """Return timm's name of the pretrained weights of a backbone: of the default one those of the default file."""
    return "convnext_tiny.fb_in22k" if backbone == TrainConfig.backbone else backbone


def load_file(backbone: nn.Module, name: str, path: str | Path) -> Receipt:
    """Load a weights file of any naming scheme into `backbone`, timm's model `name`. Raises WeightsError."""
    return load_state(backbone, name, read_tensors(path), printable(path), sha256_of(path))


def load_state(backbone: nn.Module, name: str, state: State, source: str, sha256: str) -> Receipt:
    """Rename the tensors to timm's keys, leave a classifier out, and load the others strictly.

    Raises WeightsError listing the keys that are missing, unexpected or of another shape.
    """
    naming, renamed = to_timm_names(state)
    classifier = timm.get_pretrained_cfg(name).classifier or "head.fc"
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    wanted = backbone.state_dict()
    kept = {k: v for k, v in renamed.items() if k in wanted or not k.startswith(tuple(f"{h}." for h in heads))}
    kept = {k: _same_shape(v, wanted[k]) if k in wanted else v for k, v in kept.items()}
    missing, extra = sorted(set(wanted) - set(kept)), sorted(set(kept) - set(wanted))
    # The counters of batch norm do not affect the output; older files do not have them.
    missing = [k for k in missing if not k.endswith("num_batches_tracked")]
    shapes = [k for k in kept if k in wanted and kept[k].shape != wanted[k].shape]
    if missing or extra or shapes:
        raise WeightsError(
            f"{source}: {len(set(wanted) & set(kept)) - len(shapes)} of {len(wanted)} tensors fit {name} "
            f"(read as {naming} names); {_listing('missing', missing)}{_listing('unexpected', extra)}"
            f"{_listing('of another shape', shapes)}give weights of {name}, or the --backbone they are of"
        )
    # still strict: only the counters excepted above may be missing
    backbone.load_state_dict({**{k: v for k, v in wanted.items() if k not in kept}, **kept})
    return Receipt(source, naming, len(kept), len(renamed) - len(kept), sha256)


def load_from_hub(backbone: nn.Module, name: str, ways: str) -> Receipt:
    """Load timm's published weights of `name` into `backbone`, from the local cache or over the network.

    Raises WeightsError, ending with the alternatives `ways`, if there are none or the hub cannot be reached.
    """
    if not timm.is_model_pretrained(name):
        raise WeightsError(f"{name}: timm has no pretrained weights for it; {ways}")
    pretrained = timm.get_pretrained_cfg(name)
    try:
        if not _is_cached(pretrained.hf_hub_id) and not _hub_is_reachable():
            raise OSError("no network")
        state = timm.create_model(name, pretrained=True, num_classes=0).state_dict()
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise WeightsError(f"{name}: no weights file here, and timm's hub gave none ({reason}); {ways}") from error
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(key.encode() + state[key].contiguous().numpy().tobytes())
    return load_state(backbone, name, state, f"hub {pretrained.hf_hub_id}", digest.hexdigest())


def to_timm_names(state: State) -> tuple[str, State]:
    """Return (naming scheme, the same tensors under timm's names)."""
    prefix = _prefix(state)
    state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    naming: str = "timm"
    rename: tuple[tuple[str, str], ...] | None = None
    if any(k.startswith("downsample_layers.") for k in state):
        naming, rename = "facebook", _FACEBOOK
    elif any(re.match(r"features\.\d+\.\d+\.block\.", k) for k in state):
        naming, rename = "torchvision", _TORCHVISION
    if rename:
        state = {_renamed(k, rename): v for k, v in state.items()}
    return (f"lightning ({prefix}*) {naming}" if prefix else naming), state


def fingerprint(architecture: str, state: State, preprocessing: Preprocessing) -> str:
    """Return a sha256 (64 hexadecimal digits) of the architecture, the preprocessing and every weight as float32
    (without the integer counters of batch norm). Embeddings are comparable only if their fingerprints are equal; the
    kind of file that holds the weights makes no difference."""
    digest = hashlib.sha256(json.dumps([architecture, preprocessing.as_dict()], sort_keys=True).encode())
    for name in sorted(state):
        tensor = state[name]
        if tensor.is_floating_point():
            digest.update(f"{name} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().float().contiguous().numpy().astype("<f4", copy=False).data)
    return digest.hexdigest()


def sha256_of(path: str | Path) -> str:
    """Return the sha256 of a file, in hexadecimal. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Patterns of names of ConvNeXt -> timm's names, as in timm/models/convnext.py.
_FACEBOOK = (
    (r"^downsample_layers\.0\.(\d)\.", r"stem.\1."),
    (r"^downsample_layers\.(\d)\.(\d)\.", r"stages.\1.downsample.\2."),
    (r"^stages\.(\d)\.(\d+)\.dwconv\.", r"stages.\1.blocks.\2.conv_dw."),
    (r"^stages\.(\d)\.(\d+)\.pwconv(\d)\.", r"stages.\1.blocks.\2.mlp.fc\3."),
    (r"^stages\.(\d)\.(\d+)\.(norm\.|gamma$)", r"stages.\1.blocks.\2.\3"),
    (r"^norm\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)
_TORCHVISION = (
    (r"^features\.0\.(\d)\.", r"stem.\1."),
    *((rf"^features\.{2 * i + 1}\.(\d+)\.block\.0\.", rf"stages.{i}.blocks.\1.conv_dw.") for i in range(4)),
    *((rf"^features\.{2 * i + 1}\.(\d+)\.block\.2\.", rf"stages.{i}.blocks.\1.norm.") for i in range(4)),
    *((rf"^features\.{2 * i + 1}\.(\d+)\.block\.3\.", rf"stages.{i}.blocks.\1.mlp.fc1.") for i in range(4)),
    *((rf"^features\.{2 * i + 1}\.(\d+)\.block\.5\.", rf"stages.{i}.blocks.\1.mlp.fc2.") for i in range(4)),
    *((rf"^features\.{2 * i + 1}\.(\d+)\.layer_scale$", rf"stages.{i}.blocks.\1.gamma") for i in range(4)),
    *((rf"^features\.{2 * i}\.(\d)\.", rf"stages.{i}.downsample.\1.") for i in range(1, 4)),
    (r"^classifier\.0\.", "head.norm."),
    (r"^classifier\.2\.", "head.fc."),
)
_PREFIXES = ("model.backbone.", "teacher.backbone.", "backbone.", "module.", "model.")


def _prefix(state: State) -> str:
    """Return the prefix of a wrapper: of a Lightning checkpoint that of the backbone, else one that all keys share."""
    for prefix in _PREFIXES:
        share = sum(k.startswith(prefix) for k in state)
        if share and ("backbone." in prefix or share == len(state)):
            inner = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            return prefix + _prefix(inner)
    return ""


def _renamed(key: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, target in rules:
        key, hits = re.subn(pattern, target, key)
        if hits:
            return key
    return key


def _same_shape(tensor: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return `tensor` in the shape of `wanted` if the two differ only in dimensions of size 1 (layer scale [C,1,1] and
    [C]; a 1 x 1 convolution [O,I,1,1] and a linear layer [O,I]), else unchanged."""
    squeezed = [n for n in tensor.shape if n != 1] == [n for n in wanted.shape if n != 1]
    return tensor.reshape(wanted.shape) if squeezed else tensor


def _listing(what: str, keys: list[str]) -> str:
    if not keys:
        return ""
    rest = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return f"{len(keys)} {what}: {printable(', '.join(k[:80] for k in keys[:3]))}{rest}; "


def _is_cached(hub_id: str | None) -> bool:
    from huggingface_hub import try_to_load_from_cache

    names = ("model.safetensors", "pytorch_model.bin")
    return hub_id is not None and any(isinstance(try_to_load_from_cache(hub_id, name), str) for name in names)


def _hub_is_reachable() -> bool:
    """Return whether the hub's host name resolves, or a proxy is set. Without this check huggingface_hub retries for
    45 s."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True
