"""Transformers itself: its model, image processor and tokenizer, for what a bundle has to give."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

NEW = 8


class Oracle:
    """transformers' own model, image processor and tokenizer."""

    def __init__(self, path):
        config = transformers.AutoConfig.from_pretrained(path)
        self.family = config.model_type
        self.image_token, self.video_token = config.image_token_id, getattr(config, "video_token_id", None)
        auto = transformers.AutoModelForImageTextToText
        self.model = auto.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
        # Where torchvision is installed, its filter would be taken, which rounds some pixels otherwise.
        self.processor = transformers.AutoImageProcessor.from_pretrained(path, backend="pil")
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path)

    def images(self, pictures):
        """What the model takes of the pictures of one conversation."""
        if self.family != "llava_onevision":
            return dict(self.processor(pictures, return_tensors="pt"))
        made = self.processor([pictures], return_tensors="pt")
        return dict(made) | {"batch_num_images": torch.as_tensor(made["batch_num_images"])}

    @torch.no_grad()
    def features(self, pictures):
        """Of each picture the whole sequence of visual tokens, [L, D]."""
        return list(self.model.get_image_features(**self.images(pictures)).pooler_output)

    def ids(self, turns, lengths, video=1):
        """A conversation of (pictures, prompt, answer) as token ids, with all placeholders."""
        messages = []
        for count, text, answer in turns:
            content = [*[{"type": "image"}] * count, {"type": "text", "text": text}]
            messages.append({"role": "user", "content": content})
            if answer is not None:
                messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids, remaining = [], iter(lengths)
        for token in self.tokenizer(text)["input_ids"]:
            count = (
                next(remaining) if token == self.image_token else video if token == self.video_token else 1
            )
            ids += [token] * count
        return torch.tensor([ids])

    @torch.no_grad()
    def answer(self, ids, shown):
        """Greedy tokens after a prompt."""
        out = self.model.generate(input_ids=ids, **shown, max_new_tokens=NEW, do_sample=False)
        return tuple(out[0, ids.shape[1] :].tolist())

    def generate(self, turns, pictures):
        ids = self.ids(turns, [len(f) for f in self.features(pictures)])
        return self.answer(ids, self.images(pictures))

    @torch.no_grad()
    def generate_pruned(self, prompt, pictures, rows):
        """Greedy tokens with some rows of the visual sequences only."""
        features = [f[row] for f, row in zip(self.features(pictures), rows, strict=True)]
        ids = self.ids([(len(pictures), prompt, None)], [len(f) for f in features])
        return self._answer_with(ids, self.image_token, torch.cat(features))

    @torch.no_grad()
    def generate_pruned_video(self, prompt, pixels, rows):
        """Greedy tokens with some rows of the sequence of a video's frames [T, 3, H, W]."""
        features = self.model.get_video_features(pixel_values_videos=pixels[None]).pooler_output[0][rows]
        ids = self.ids([(0, f"<video>\n{prompt}", None)], [], len(features))
        return self._answer_with(ids, self.video_token, features)

    def _answer_with(self, ids, placeholder, features):
        embeds = self.model.get_input_embeddings()(ids).clone()
        embeds[ids == placeholder] = features
        out = self.model.generate(inputs_embeds=embeds, max_new_tokens=NEW, do_sample=False)
        return tuple(out[0].tolist())

    def pooled(self, values):
        """What the model makes of the tokens of frames, [T, N, X] -> [T, fewer, X]."""
        model = self.model.model
        pool = model.apply_pooling if self.family == "llava_onevision" else model.vision_resampler
        return pool(values)

    def received(self, image):
        """Mean attention that each patch of each tile receives from the patches, [T, N]."""
        return self.received_in(self.images([image])["pixel_values"])

    @torch.no_grad()
    def received_in(self, pixels):
        """The same, of tiles [..., 3, H, W]."""
        tower, config = self.model.model.vision_tower, self.model.config
        out = tower(pixels.reshape(-1, *pixels.shape[-3:]), output_attentions=True)
        depth, chosen = len(out.attentions), config.vision_feature_layer
        chosen = [chosen] if isinstance(chosen, int) else chosen
        layer = max(index if index >= 0 else depth + 1 + index for index in chosen) - 1
        skipped = out.attentions[0].shape[-1] - (config.vision_config.image_size // 14) ** 2
        return out.attentions[layer].mean(dim=1)[:, skipped:, skipped:].mean(dim=1).numpy()
