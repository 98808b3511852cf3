"""The same work in PyTorch: the checkpoint in transformers, on the CPU and with all of its visual tokens."""

from __future__ import annotations

import time
from typing import Any

from visprune.bench.measure.protocol import Contender, Done, elapsed, peak_memory
from visprune.bench.report.report import Repetition, Workload
from visprune.export import models
from visprune.export.checkpoint import loading
from visprune.export.checkpoint.checkpoint_options import CheckpointOptions
from visprune.export.checkpoint.find import find
from visprune.export.checkpoint.processors import load_processor
from visprune.export.checkpoint.prompt_maker import PromptMaker
from visprune.export.graph import weightless
from visprune.runtime.vision.images import decode

__all__ = ["CheckpointModel"]

_STAGES = {
    "vision_encoder": ("model.vision_tower",),
    "token_pruner": ("model.multi_modal_projector",),  # the graph of a bundle that has the projector
    "embedding": ("model.language_model.embed_tokens",),
    "prefill": ("model.language_model.layers", "model.language_model.norm", "lm_head"),
}


class CheckpointModel:
    """A checkpoint in transformers; the time of a stage is the time spent in its modules.

    Args:
        contender: The directory of the checkpoint, and the data type.
        work: The work to repeat.
    """

    def __init__(self, contender: Contender, work: Workload) -> None:
        import torch

        loading.silence_transformers()
        torch.set_num_threads(work.threads)
        torch.set_grad_enabled(False)
        start = time.perf_counter()
        options = CheckpointOptions(
            chat_template=contender.chat_template,
            adapter=list(contender.adapters),
            vision_tower=contender.vision_tower,
            pickled_weights=True,  # the bundle's weights are these; only a pickle of tensors is ever read
        )
        checkpoint = find(contender.path, options)
        config = loading.load_config(checkpoint)
        self._dtype = getattr(torch, contender.dtype or "float32")
        self._model: Any = weightless.load_model(checkpoint, self._dtype)
        self._model.set_attn_implementation("sdpa")
        _grow_table(self._model, config.image_token_id)
        features = models.family(checkpoint.model_type).features(config)
        self._prompts = PromptMaker(
            load_processor(checkpoint, config),
            features,
            config.text_config.vocab_size,
        )
        self.load = elapsed(start)
        self._work = work
        self._spent: dict[str, float] = {}
        for stage, names in _STAGES.items():
            for name in names:
                self._watch(stage, self._model.get_submodule(name))

    def repeat(self) -> Done:
        """Run one prompt, and generate its answer greedily."""
        import transformers

        self._spent.clear()
        start = time.perf_counter()
        made = self._inputs()
        preprocess = elapsed(start)
        config = self._model.config
        cache: Any = transformers.DynamicCache(config=config.text_config)
        out = self._model(**made, past_key_values=cache, logits_to_keep=1)
        token = out.logits[:, -1].argmax(-1, keepdim=True)  # [B, 1]
        first = elapsed(start)
        stages = {"preprocess": preprocess, **self._spent}
        stages["other"] = max(0.0, first - sum(stages.values()))
        held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
        start, steps = time.perf_counter(), self._work.max_new_tokens - 1
        for _ in range(steps):
            out = self._model(input_ids=token, past_key_values=cache, logits_to_keep=1)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
        ids = made["input_ids"]
        visual = int((ids == config.image_token_id).sum())
        return Done(
            Repetition(first, stages, elapsed(start) / steps),
            visual,
            (visual,) * config.text_config.num_hidden_layers,
            ids.shape[1] - visual,
            self._work.max_new_tokens,
            held,
            peak_memory(),
        )

    def overlays(self) -> list[str]:
        """Return no overlay, because nothing is pruned."""
        return []

    def _inputs(self) -> Any:
        shown = [decode(image) for image in self._work.images]
        made = self._prompts(shown, self._work.prompt, self._work.system).inputs()
        return made | {"pixel_values": made["pixel_values"].to(self._dtype)}

    def _watch(self, stage: str, module: Any) -> None:
        """Add the time spent in a module, or in each module of a list, to the time of a stage."""
        if type(module).__name__ == "ModuleList":
            for part in module:
                self._watch(stage, part)
            return
        starts: list[float] = []

        def begin(*_: object) -> None:
            starts.append(time.perf_counter())

        def end(*_: object) -> None:
            self._spent[stage] = self._spent.get(stage, 0.0) + elapsed(starts.pop())

        module.register_forward_pre_hook(begin)
        module.register_forward_hook(end)


def _grow_table(model: Any, image_token_id: int) -> None:
    """Give the image placeholder a row of the embedding table if it has none; the head stays as it is.

    transformers looks placeholders up before it replaces them.
    """
    import torch

    table = model.get_input_embeddings()
    more = image_token_id + 1 - table.weight.shape[0]
    if more > 0:
        rows = torch.cat([table.weight, table.weight.new_zeros(more, table.weight.shape[1])])
        table.weight = torch.nn.Parameter(rows, requires_grad=False)
