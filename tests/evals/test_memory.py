"""Activations on the way back: fewer are kept where they do not fit, and the gradients are the same bits."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from evals import engine as engine_module
from evals import memory
from evals.engine import Engine
from tests.evals.test_engine import pairs, toy
from tests.pico import byte_tokenizer


def test_free_memory_is_what_the_system_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < memory.free_bytes(torch.device("cpu")) < total
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "MemTotal: 9 kB\nMemAvailable:  3 kB\n")
    assert memory.free_bytes(torch.device("cpu")) == 3 * 1024


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_neox", "mamba"])
def test_layers_that_run_again_give_the_same_gradients(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    extra = {"state_size": 8, "hidden_act": "silu"} if kind == "mamba" else {}
    model = toy(kind, **extra)
    engine = Engine(model, byte_tokenizer(), token_budget=256)
    found, kept = [], []
    for fits in (True, False):
        monkeypatch.setattr(engine_module, "fits_whole", lambda *_, fits=fits: fits)
        model.requires_grad_(True)
        model.zero_grad()
        sizes: list[int] = []
        with saved_tensors_hooks(
            lambda tensor, sizes=sizes: sizes.append(tensor.nbytes) or tensor, lambda tensor: tensor
        ):
            engine.backward(pairs(8), lambda x: -x.sum())
        kept.append(sum(sizes))
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert "forward" not in vars(next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))[0])


def test_a_pass_that_takes_more_than_its_share_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy("llama")
    needed = memory.activation_bytes(model.config, 100, 4)
    assert needed == 100 * 2 * (20 * 32 + 4 * 64) * 4
    for free, fits in ((memory.SHARE * needed, True), (memory.SHARE * needed - memory.SHARE, False)):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        assert memory.fits_whole(model, 100) == fits
