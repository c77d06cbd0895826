"""A study that runs in seconds: a pico model, an expert made by noise, and two tasks of short texts."""

from __future__ import annotations

import json
from pathlib import Path

from optimizer.study.new_study import commented_study
from tests.pico import pico_expert, pico_llama

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {name}.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: bits_per_byte}}
"""


def write_task(folder: Path, name: str, items: int = 20) -> Path:
    """Write a task folder of short texts, and return its YAML file."""
    folder = folder / name
    folder.mkdir(parents=True)
    texts = [{"text": f"{name} number {i} is {i * i}"} for i in range(items)]
    (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(text) for text in texts), encoding="utf-8")
    (folder / f"{name}.yaml").write_text(TASK.format(name=name), encoding="utf-8")
    return folder / f"{name}.yaml"


def write_study(folder: Path, *, items: int = 4, trials: int = 7) -> Path:
    """Write models, tasks and a study file without Ray, and return the study file."""
    base = pico_llama(folder / "base", layers=2)
    pico_expert(base, folder / "expert", scale=0.1)
    for name in ("skill", "manners"):
        write_task(folder, name)
    text = commented_study(
        "./base",
        {"clinical": "./expert"},
        name="small",
        domain=["./skill/skill.yaml"],
        general=["./manners/manners.yaml"],
    )
    for old, new in {
        "items: 30": f"items: {items}",
        "  bank: 200": "  # no bank",
        "holdout_items: 100": f"holdout_items: {items}",
        "racing: true": "racing: false",
        "{curve: 4}": "slope",
        "trials: 40": f"trials: {trials}",
        "learned: 5": "learned: 0",
        "derived: [kfac]": "derived: none",
        "sampler: auto": "sampler: random",
        "count: 1": "count: 0",
        "threads: auto": "threads: 1",
    }.items():
        assert old in text, old
        text = text.replace(old, new)
    path = folder / "study.yaml"
    path.write_text(text, encoding="utf-8")
    return path
