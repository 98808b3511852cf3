"""The loaded parts of a bundle that all conversations with it share."""

from __future__ import annotations

from dataclasses import dataclass, field

from visprune.manifest import Manifest
from visprune.runtime.bounded import BoundedCache
from visprune.runtime.chat_template import ChatTemplate
from visprune.runtime.executor import Executor, PictureCache
from visprune.runtime.prefixes import Prefixes
from visprune.runtime.session import Session
from visprune.runtime.text import Tokenizer
from visprune.runtime.vision.kept_tokens import Keep
from visprune.runtime.vision.pictures import PictureMaker

__all__ = ["Caches", "LoadedModel"]


@dataclass(frozen=True, slots=True)
class Caches:
    """What is kept from earlier requests.

    Attributes:
        pictures: Features of images, before the pruner.
        prefixes: Caches of conversations.
    """

    pictures: PictureCache = field(default_factory=lambda: BoundedCache(0))
    prefixes: Prefixes = field(default_factory=lambda: Prefixes(0))


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """The loaded parts of a bundle."""

    manifest: Manifest
    executor: Executor
    tokenizer: Tokenizer
    template: ChatTemplate
    pictures: PictureMaker
    cache_capacities: tuple[float, ...] = ()
    """Most tokens in the caches of each group of layers, from the function `session.cache_capacities`."""
    caches: Caches = field(default_factory=Caches)

    def session(self, keep: Keep) -> Session:
        """Return an empty session."""
        return Session(self.executor, self.manifest, keep, self.cache_capacities)
