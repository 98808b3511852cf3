"""Time to fit a FitPrune recipe, in forward passes of the whole model.

    python measurements/fit.py --work /tmp/visprune-bench

A pass is transformers' own prefill of an image and a prompt (sdpa, logits of the last position). The time of
a fit is that of `visprune.fit` from the first image on, without loading the weights. It is compared with a
plain fit, which reruns the model for each alpha: it encodes the images anew, uses transformers' eager
attention in every layer, and cuts no evaluation short. The plain fit's time is proportional to the samples,
so it may take fewer; its scheme is compared with that of `visprune.fit` on the same samples.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from model import THREADS, make

import visprune
from visprune.bundled import CALIBRATION
from visprune.runtime.vision.images import decode
from visprune.work import LayerWork

_HALVINGS = 7


class Seconds(NamedTuple):
    """Seconds of wall-clock time, and of processor time over all cores, which other programs affect less."""

    wall: float
    cpu: float

    def passes(self, one: Seconds, samples: int) -> str:
        """Return a text with the time in seconds, and in forward passes for each sample."""
        wall, cpu = (mine / theirs / samples for mine, theirs in zip(self, one, strict=True))
        return f"{self.wall:6.1f} s = {wall:5.2f} passes a sample (by processor time {cpu:5.2f})"


def now() -> Seconds:
    """Read both clocks."""
    return Seconds(time.perf_counter(), time.process_time())


def since(start: Seconds) -> Seconds:
    """Return the seconds since an earlier reading of both clocks."""
    end = now()
    return Seconds(end.wall - start.wall, end.cpu - start.cpu)


def prompts(checkpoint: Path, count: int) -> list[Any]:
    """Return the inputs of the model for the first bundled samples."""
    processor = transformers.AutoProcessor.from_pretrained(checkpoint)
    made = []
    for line in CALIBRATION.read_text(encoding="utf-8").splitlines()[:count]:
        sample = json.loads(line)
        picture = decode(CALIBRATION.parent / sample["image"])
        content = [{"type": "image", "image": picture}, {"type": "text", "text": sample["prompt"]}]
        made.append(
            processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
        )
    return made


def load(checkpoint: Path, attention: str) -> Any:
    """Load the model in float32."""
    auto = transformers.LlavaForConditionalGeneration
    return auto.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation=attention).eval()


@torch.no_grad()
def forward_seconds(checkpoint: Path, repeats: int) -> Seconds:
    """Return the median times of a prefill."""
    model = load(checkpoint, "sdpa")
    (sample,) = prompts(checkpoint, 1)
    times = []
    for _ in range(repeats + 1):
        start = now()
        model(**sample, use_cache=False, logits_to_keep=1)
        times.append(since(start))
    return Seconds(*(statistics.median(column) for column in zip(*times[1:], strict=True)))


def visprune_side(checkpoint: Path, ratio: float, samples: Path) -> tuple[Any, Seconds]:
    """Fit with visprune; return the recipe and the time."""
    first: list[Seconds] = []

    def progress(what: str, done: int, total: int) -> None:
        if what == "encoding the images" and not first:
            first.append(now())

    recipe = visprune.fit(checkpoint, ratio=ratio, data=samples, progress=progress)
    return recipe, since(first[0])


class Plain:
    """A plain fit that follows the definition literally."""

    def __init__(self, checkpoint: Path, count: int) -> None:
        self.model = load(checkpoint, "eager")
        self.decoder = self.model.model.language_model
        self.samples = prompts(checkpoint, count)
        text = self.model.config.text_config
        self.work = LayerWork(text.hidden_size, text.intermediate_size)

    @torch.no_grad()
    def run(self, alpha: float | None, totals: Any, ratio: float) -> tuple[Any, bool, list[int]]:
        """Run all samples through all layers: totals by layer, whether the budget is met, and the scheme."""
        layers = len(self.decoder.layers)
        states = [self._embedded(sample) for sample in self.samples]
        full = layers * self.work.layer(len(states[0]["visual"]))
        found, scheme, met = [], [0] * layers, False
        spent = [0] * len(states)
        for index, layer in enumerate(self.decoder.layers):
            forecast = [
                s + (layers - index) * self.work.layer(len(state["visual"]))
                for s, state in zip(spent, states, strict=True)
            ]
            met = met or sum(forecast) / len(states) <= ratio * full
            row, gone = [], 0
            for number, state in enumerate(states):
                entered = len(state["visual"])
                stats = self._attend(layer, state)
                row.append([float(values.sum()) for values in stats])
                if alpha is not None and not met:
                    gone += self._delete(state, stats, totals[index][number], alpha)
                hidden = state["hidden"]
                state["hidden"] = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
                left = len(state["visual"])
                spent[number] += self.work.before_deletion(entered) + self.work.after_deletion(left)
            found.append(row)
            scheme[index] = gone // len(states)
        return found, met or sum(spent) / len(states) <= ratio * full, scheme

    def search(self, ratio: float) -> list[int]:
        """Return the scheme."""
        totals, _, scheme = self.run(None, None, ratio)
        low, high = 0.0, 1.0
        for _ in range(_HALVINGS):
            alpha = (low + high) / 2
            _, met, tried = self.run(alpha, totals, ratio)
            low, high = (low, alpha) if met else (alpha, high)
            scheme = tried if met else scheme
        return scheme

    def _embedded(self, sample: Any) -> dict[str, Any]:
        ids = sample["input_ids"]
        hidden = self.decoder.get_input_embeddings()(ids)
        visual = (ids[0] == self.model.config.image_token_id).nonzero().flatten()
        features = self.model.model.get_image_features(pixel_values=sample["pixel_values"]).pooler_output[0]
        hidden[0, visual] = features
        return {"hidden": hidden, "visual": visual, "positions": torch.arange(ids.shape[1])[None]}

    def _attend(self, layer: Any, state: dict[str, Any]) -> list[torch.Tensor]:
        hidden, visual = state["hidden"], state["visual"]
        mask = torch.full((hidden.shape[1],) * 2, float("-inf")).triu(1)[None, None]
        out, probabilities = layer.self_attn(
            layer.input_layernorm(hidden),
            attention_mask=mask,
            position_embeddings=self.decoder.rotary_emb(hidden, state["positions"]),
        )
        state["hidden"] = hidden + out
        highest = probabilities[0].amax(0).double()
        return [highest[visual][:, visual].mean(0), highest[int(visual[-1]) + 1 :][:, visual].mean(0)]

    def _delete(self, state: dict[str, Any], stats: list[torch.Tensor], totals: Any, alpha: float) -> int:
        sets = []
        for values, total in zip(stats, totals, strict=True):
            ascending, order = values.sort()
            rest = float(values.sum()) - ascending.cumsum(0)  # [k - 1]: kept if k tokens go
            sets.append(set(order[:-1][rest[:-1] >= (1 - alpha) * total].tolist()))
        gone = sorted(sets[0] & sets[1])
        keep = torch.ones(state["hidden"].shape[1], dtype=torch.bool)
        keep[state["visual"][gone]] = False
        state["hidden"], state["positions"] = state["hidden"][:, keep], state["positions"][:, keep]
        first = int(state["visual"][0])
        state["visual"] = torch.arange(first, first + len(state["visual"]) - len(gone))
        return len(gone)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("/tmp/visprune-bench"))
    parser.add_argument("--ratio", type=float, default=0.4)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--plain-samples", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    checkpoint = make(args.work / "checkpoint")
    print(f"{THREADS} cores, {torch.get_num_threads()} threads, ratio {args.ratio:g}", flush=True)
    one = forward_seconds(checkpoint, args.repeats)
    print(f"one forward pass      {one.wall:6.2f} s", flush=True)
    lines = [json.loads(line) for line in CALIBRATION.read_text(encoding="utf-8").splitlines()]
    lines = [{**line, "image": str(CALIBRATION.parent / line["image"])} for line in lines]
    schemes = {}
    for count in (args.plain_samples, args.samples):
        samples = args.work / f"samples-{count}.jsonl"
        samples.write_text("\n".join(map(json.dumps, lines[:count])), encoding="utf-8")
        recipe, seconds = visprune_side(checkpoint, args.ratio, samples)
        schemes[count] = recipe.scheme
        print(f"visprune, {count:2d} samples  {seconds.passes(one, count)}")
        print(
            f"    alpha {recipe.alpha:.4f}, {recipe.ratio_reached:.4f} of the work, {recipe.scheme}",
            flush=True,
        )
    again = forward_seconds(checkpoint, args.repeats)
    print(f"one forward pass      {again.wall:6.2f} s, again", flush=True)
    plain = Plain(checkpoint, args.plain_samples)
    start = now()
    scheme = plain.search(args.ratio)
    print(f"plain, {args.plain_samples:2d} samples     {since(start).passes(one, args.plain_samples)}")
    same = tuple(scheme) == schemes[args.plain_samples]
    print(f"the same scheme: {'yes' if same else f'no, {scheme}'}")


if __name__ == "__main__":
    main()
