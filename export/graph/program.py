"""The program in the manifest: the order in which the graphs run, and the values that they exchange."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from visprune.manifest import EMPTY, Stage

if TYPE_CHECKING:
    from visprune.manifest import Graph, LayerPruning

__all__ = ["GATHERED", "program"]

GATHERED = ("hidden_states", "position_ids", "is_visual", "is_rater")
"""The values that pass from one segment to the next, and from which a prune point gathers the kept tokens.
`is_rater` is one of them only if the method has raters."""


def program(graphs: Mapping[str, Graph], inside: LayerPruning | None) -> tuple[Stage, ...]:
    """Return the stages of a bundle: every graph once, in order, and the segment pruner at each prune point.

    Values have the names of the tensors, with these exceptions: the features before the pruner are
    `vision_features`; the embeddings of the question's tokens, which the embedding graph makes before the
    pruner runs, are `question_embeds`; the output of segment k is `last_hidden_state.{k}`; and after prune
    point k the values that pass on are `hidden_states.{k + 1}`, `position_ids.{k + 1}`, `is_visual.{k + 1}`
    and, with a method that has raters, `is_rater.{k + 1}`.

    Args:
        graphs: The bundle's graphs by name, in the order in which they run.
        inside: The pruning inside the LLM, if any.
    """
    stages: list[Stage] = []
    flow = {name: name for name in GATHERED} | {"hidden_states": ""}
    point = 0
    for name, graph in graphs.items():
        if name == "segment_pruner":
            continue
        if not name.startswith("decoder"):
            if any(spec.name == "question_embeds" for spec in graph.inputs):
                stages.append(_question(graphs["embedding"]))
            stages.append(_before_the_decoder(name, graph))
            continue
        outputs = {spec.name: spec.name for spec in graph.outputs}
        if "last_hidden_state" in outputs:
            outputs["last_hidden_state"] += f".{name.rpartition('_')[2]}"
        if "token_scores" in outputs:
            outputs["token_scores"] = f"token_scores.{point}"
        inputs = {spec.name: flow.get(spec.name, spec.name) for spec in graph.inputs}
        stages.append(Stage(name, "always", inputs, outputs))
        flow["hidden_states"] = outputs.get("last_hidden_state", "")
        if "token_scores" in outputs:
            flow = _prune(stages, graphs["segment_pruner"], flow, point, inside)
            point += 1
    return tuple(stages)


def _question(graph: Graph) -> Stage:
    """Return the stage that embeds the question of one image, without visual tokens."""
    values = {"input_ids": "question_ids", "image_features": EMPTY}
    inputs = {spec.name: values[spec.name] for spec in graph.inputs}
    return Stage("embedding", "image", inputs, {"inputs_embeds": "question_embeds"})


def _before_the_decoder(name: str, graph: Graph) -> Stage:
    """Return the stage of a graph that runs before the decoder."""
    renamed = {("vision_encoder", "image_features"): "vision_features"}
    return Stage(
        graph=name,
        when="image" if name in ("vision_encoder", "token_pruner") else "always",
        inputs={spec.name: spec.name for spec in graph.inputs},
        outputs={spec.name: renamed.get((name, spec.name), spec.name) for spec in graph.outputs},
    )


def _prune(
    stages: list[Stage], graph: Graph, flow: dict[str, str], point: int, inside: LayerPruning | None
) -> dict[str, str]:
    """Add the stage of one prune point; return the names of the values that pass on, by tensor name."""
    passed = [name for name in GATHERED if any(spec.name == name for spec in graph.inputs)]
    kept = {name: f"{name}.{point + 1}" for name in passed}
    # The runtime itself counts renumbered positions, because it knows how many tokens each segment has seen.
    taken = [n for n in passed if n != "position_ids" or inside is None or inside.positions == "original"]
    inputs = {name: flow[name] for name in passed}
    inputs |= {"token_scores": f"token_scores.{point}", "keep_tokens": f"keep_tokens.{point}"}
    outputs = {f"kept_{name}": kept[name] for name in taken} | {"keep_indices": f"keep_indices.{point}"}
    bypass = {kept[name]: flow[name] for name in taken}
    inputs = {spec.name: inputs[spec.name] for spec in graph.inputs}
    stages.append(Stage("segment_pruner", "visual", inputs, outputs, bypass))
    return kept
