"""What a LoRA adapter of PEFT changes in a model, from its settings and the names of its tensors.

A weight W of a module becomes W + s B A, with s = alpha / r (arXiv 2106.09685) or, rank-stabilised,
alpha / sqrt(r) (arXiv 2312.03732). Other tensors replace those of the model. Modules have the names that the
adapter gives them; `visprune.export.checkpoint.merging` finds them in a model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from visprune.errors import CheckpointError, UnsupportedError, VispruneError
from visprune.export.files.foreign import is_adapter_name
from visprune.export.files.stored import TensorSource

__all__ = ["BiasChange", "LoraSettings", "LowRankChange", "read_changes", "read_settings"]

_MERGE = "If peft can merge it, save the model after merge_and_unload(), and export that."
_OWN = "Take both files from the same run."

# Settings with which a change is no sum of W and s B A, or goes to something else than a module's weight.
_UNSUPPORTED = (
    *("target_parameters", "trainable_token_indices", "layer_replication", "ensure_weight_tying"),
    *("alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config"),
    "monteclora_config",
)
# Initial values of A and B for which the base's weights stay as they are. Those of the others (PiSSA, OLoRA,
# CorDA, LoftQ, LoRA-GA) are subtracted from them, unless peft converted the adapter when it was saved.
_INITIAL = ("gaussian", "eva", "orthogonal", "mica")

_MOST = 1e18  # no alpha and no rank is as large; NaN is not below it either

# For instance model.layers.0.mlp.up_proj.lora_A.default.weight, where the adapter's name may be missing.
_KEY = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(\.(?!(weight|bias)$)[^.]+)?(\.(?P<leaf>weight|bias))?"
)
_BASE = re.compile(r"\.base_layer(?=\.(weight|bias)$)")
# A module that was trained as a whole has its own name, or one of these: the copy that was trained, and the
# module that it was copied from, of which PEFT may write the bias.
_COPY = re.compile(r"\.(modules_to_save(\.default)?|(?P<source>original_module))(?=\.)")
# PEFT puts the first in front of a model's names. LLaVA's training writes model.model in place of model.
_WRAPPED = re.compile(r"^(base_model\.model\.)?(model\.(?=model\.))?")


@dataclass(frozen=True, slots=True)
class LowRankChange:
    """The change of the weight of one module: s B A is added to it.

    Attributes:
        module: Name of the module, as the adapter names it.
        down: A, [r, inputs] or, of a convolution, [r, channels, height, width].
        up: B, [outputs, r] or [outputs, r, 1, 1].
        scale: s.
        embedding: Whether the module is an embedding, to whose table [rows, outputs] the transpose is added.
        magnitude: Lengths to which the outputs' weight vectors are scaled afterwards (DoRA); None for LoRA.
    """

    module: str
    down: TensorSource
    up: TensorSource
    scale: float
    embedding: bool = False
    magnitude: TensorSource | None = None

    @property
    def target(self) -> str:
        """Name of the changed tensor."""
        return f"{self.module}.weight"


@dataclass(frozen=True, slots=True)
class BiasChange:
    """The change of the bias of one module: s b is added to it.

    Attributes:
        module: Name of the module, as the adapter names it.
        bias: b, [outputs].
        scale: s.
    """

    module: str
    bias: TensorSource
    scale: float

    @property
    def target(self) -> str:
        """Name of the changed tensor."""
        return f"{self.module}.bias"


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """The settings of adapter_config.json that decide what an adapter does.

    Attributes:
        name: The adapter, for messages.
        rank: r, where `rank_pattern` has no other.
        alpha: alpha, where `alpha_pattern` has no other.
        rank_pattern: r by patterns of module names.
        alpha_pattern: alpha by patterns of module names.
        rank_stabilised: Whether s is alpha / sqrt(r).
        dora: Whether the weights are scaled to learnt lengths.
    """

    name: str
    rank: float
    alpha: float
    rank_pattern: Mapping[str, float]
    alpha_pattern: Mapping[str, float]
    rank_stabilised: bool
    dora: bool

    def scale(self, module: str, rank: int) -> float:
        """Return s of a module.

        Raises:
            CheckpointError: The settings give the module another rank than its tensors have.
        """
        said = _by_pattern(self.rank_pattern, module, self.rank)
        if said != rank:
            raise CheckpointError(
                f"The adapter {self.name} has rank {rank} at {module}, and its adapter_config.json says "
                f"{said:g}.",
                _OWN,
            )
        alpha = _by_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


def read_settings(name: str, config: Mapping[str, Any]) -> LoraSettings:
    """Check the settings of an adapter; those that are missing have PEFT's defaults.

    Args:
        name: The adapter, for messages.
        config: The content of adapter_config.json.

    Raises:
        CheckpointError: A setting has a value that it cannot have.
        UnsupportedError: The adapter is of another kind than LoRA and DoRA.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedError(f"The adapter {name} is of kind {kind}, and only LoRA is merged.", _MERGE)
    for setting in _UNSUPPORTED:
        if config.get(setting):
            raise UnsupportedError(f"The adapter {name} uses {setting}, which is not merged.", _MERGE)
    initial = config.get("init_lora_weights", True)
    if isinstance(initial, str) and initial.lower() not in _INITIAL:
        raise UnsupportedError(
            f"The adapter {name} was initialised with {initial!r}, which changed the weights of its base.",
            "Save it with peft's path_initial_model_for_weight_conversion, or export the merged model.",
        )

    def number(value: Any, setting: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _MOST:
            raise _setting_error(name, setting, value)
        return value

    def switch(setting: str) -> bool:
        value = config.get(setting)
        if not isinstance(value, bool | None):
            raise _setting_error(name, setting, value)
        return bool(value)

    def pattern(setting: str) -> dict[str, float]:
        found = config.get(setting) or {}
        if not isinstance(found, dict):
            raise _setting_error(name, setting, found)
        for key in found:
            try:
                re.compile(_ending(key))
            except re.error:
                raise _setting_error(name, setting, key) from None
        return {key: number(value, setting) for key, value in found.items()}

    return LoraSettings(
        name,
        number(config.get("r", 8), "r"),
        number(config.get("lora_alpha", 8), "lora_alpha"),
        pattern("rank_pattern"),
        pattern("alpha_pattern"),
        switch("use_rslora"),
        switch("use_dora"),
    )


def read_changes(
    settings: LoraSettings, tensors: Mapping[str, TensorSource]
) -> tuple[tuple[LowRankChange | BiasChange, ...], dict[str, TensorSource]]:
    """Sort an adapter's tensors by what they do.

    Args:
        settings: The adapter's settings.
        tensors: Its tensors, by their names on disk.

    Returns:
        The changes of modules, and the tensors that replace those of the model, by their names there.

    Raises:
        CheckpointError: A tensor is missing, or tensors do not fit each other or the settings.
        UnsupportedError: A tensor's name is not known.
    """
    modules: dict[str, dict[str, TensorSource]] = {}
    replaced: dict[str, TensorSource] = {}
    copies: dict[str, TensorSource] = {}
    sources: dict[str, TensorSource] = {}
    for key, tensor in tensors.items():
        name = _BASE.sub("", _WRAPPED.sub("", key))
        if match := _KEY.fullmatch(name):
            group = modules.setdefault(match["module"], {})
            name = match["part"].removeprefix("lora_") + (".bias" if match["leaf"] == "bias" else "")
        else:
            copy = _COPY.search(name)
            group = replaced if copy is None else sources if copy["source"] else copies
            name = _COPY.sub("", name)
            if is_adapter_name(name):
                raise _unknown(settings, key)
        if name in group:
            raise CheckpointError(f"The adapter {settings.name} has {key} twice.", _OWN)
        group[name] = tensor
    replaced = copies | replaced
    if odd := sources.keys() - replaced.keys():
        raise _unknown(settings, sources[min(odd)].name)
    return tuple(change for module in modules.items() for change in _changes(settings, *module)), replaced


def _changes(
    settings: LoraSettings, module: str, parts: Mapping[str, TensorSource]
) -> list[LowRankChange | BiasChange]:
    """Return the changes that the tensors of a module make."""
    embedding = "embedding_A" in parts or "embedding_B" in parts
    names = ("embedding_A", "embedding_B") if embedding else ("A", "B")
    wanted = {*names, *(["magnitude_vector"] if settings.dora else [])}
    if missing := sorted(wanted - parts.keys()):
        raise _module_error(settings, module, f"lacks lora_{missing[0]}")
    if unexpected := sorted(parts.keys() - wanted - {"B.bias"}):
        raise _module_error(settings, module, f"has an unexpected lora_{unexpected[0]}")
    down, up = (parts[name] for name in names)
    outer = up.shape[2:]
    if len(down.shape) < 2 or len(up.shape) < 2 or up.shape[1] != down.shape[0] or set(outer) - {1}:
        raise _module_error(settings, module, f"has matrices {list(up.shape)} and {list(down.shape)}")
    if 0 in (*up.shape, *down.shape):
        raise _module_error(settings, module, "has an empty matrix")
    scale = settings.scale(module, down.shape[0])
    found: list[LowRankChange | BiasChange] = [
        LowRankChange(module, down, up, scale, embedding, parts.get("magnitude_vector"))
    ]
    if "B.bias" in parts:
        found.append(BiasChange(module, parts["B.bias"], scale))
    return found


def _by_pattern(patterns: Mapping[str, float], module: str, otherwise: float) -> float:
    """Return the value of the first pattern that matches the end of a module's name, from a full part on."""
    matching = (value for key, value in patterns.items() if re.match(_ending(key), module))
    return next(matching, otherwise)


def _ending(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def _unknown(settings: LoraSettings, key: str) -> VispruneError:
    return UnsupportedError(
        f"The adapter {settings.name} has a tensor {key}, which is not understood.", _MERGE
    )


def _setting_error(name: str, setting: str, value: Any) -> VispruneError:
    return CheckpointError(
        f"The adapter_config.json of {name} has {value!r} in {setting}.", "Take the file that peft wrote."
    )


def _module_error(settings: LoraSettings, module: str, what: str) -> VispruneError:
    return CheckpointError(f"The adapter {settings.name} {what} at {module}.", _OWN)
