"""Forward passes that stop before every layer of a model, so that a layer's weights and statistics live one at a time.

Each pass runs in a greenlet of its own and hands back when it reaches the next layer; no architecture is taken apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LayerByLayer:
    """Groups of forward passes through one model, all of them before the same layer.

    Args:
        model: its layers run in the order of a ModuleList.
        passes: by group; each runs the model once.
    """

    def __init__(self, model: PreTrainedModel, passes: Mapping[str, Sequence[Callable[[], object]]]) -> None:
        from greenlet import greenlet  # here: whoever only scores does without it

        self._layers = layers_of(model)
        self._main = greenlet.getcurrent()
        self._waiting = {group: [greenlet(run) for run in runs] for group, runs in passes.items()}

    def __len__(self) -> int:
        return len(self._layers)

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """Have every pass that was begun with `advance` pause before each layer, and drop those that have not ended."""
        hooks = [layer.register_forward_pre_hook(self._pause) for layer in self._layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for runs in self._waiting.values():
                for run in filter(bool, runs):  # those under way
                    run.throw()

    def advance(self, group: str) -> None:
        """Let the passes of a group run on, up to the next layer: from the start through the embeddings first."""
        for run in self._waiting[group]:
            run.switch()

    def _pause(self, *_: Any) -> None:
        self._main.switch()


def layers_of(model: PreTrainedModel) -> Sequence[torch.nn.Module]:
    """Return the layers of a model, first to last.

    Raises:
        ValueError: it has no list of as many modules as its config says it has layers.
    """
    count = model.config.get_text_config().num_hidden_layers
    for module in (model.get_decoder() or model).modules():  # not those of a tower beside it
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return list(module)
    raise ValueError(f"{type(model).__name__} has no list of {count} layers")
