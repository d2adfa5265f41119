"""benchmarks/methods.py: which sources are measured where, and what distilling added in its table."""

from __future__ import annotations

import json
from argparse import Namespace


def write_run(folder, values: dict[str, list[float]], lr: float = 0.05) -> None:
    rows = [
        {"source": source, "architecture": "convnet", "seed": seed, "split": "test", "overall": value, "head": value,
         "medium": value, "tail": value - 0.2, "settings": {"epochs": 300, "lr": lr}}
        for source, of in values.items() for seed, value in enumerate(of)
    ]  # fmt: skip
    (folder / "evaluation").mkdir(parents=True)
    (folder / "evaluation" / "results.json").write_text(json.dumps({"rows": rows}))


def arguments(tmp_path, **fields) -> Namespace:
    given = {"methods": ["lad", "datm"], "seeds": [0, 1], "ipc": [2], "factors": [None], "architectures": ["convnet"],
             "baselines": ["initial", "random-soft", "full"], "out": tmp_path}  # fmt: skip
    return Namespace(**{**given, **fields})


def test_the_starting_set_is_measured_in_every_run_and_other_baselines_once(benchmark_module, tmp_path):
    runs = benchmark_module("methods").plan(arguments(tmp_path))
    assert {r.method: r.baselines for r in runs} == {"lad": ("initial", "random-soft", "full"), "datm": ("initial",)}


def test_the_gain_is_the_mean_over_seeds_of_paired_differences(benchmark_module, tmp_path):
    module, args = benchmark_module("methods"), arguments(tmp_path)
    runs = module.plan(args)
    for run in runs:
        if run.method == "lad":  # 1 and 3 points: mean 2, standard error 1
            more = 0.01 + 0.02 * run.seed
            write_run(run.folder(tmp_path), {"distilled": [0.5 + more, 0.7 + more], "initial": [0.5, 0.7],
                                             "random-soft": [0.4, 0.4], "full": [0.9]}, 0.05 + 0.001 * run.seed)  # fmt: skip
        else:
            write_run(run.folder(tmp_path), {"distilled": [0.4, 0.4]})
    cells_of = [[cell.strip() for cell in text.split("|")] for text in module.table(args, runs).splitlines()]
    lines = {cells[4]: cells for cells in cells_of}
    assert lines["trained on"][9:12] == ["over its start", "seeds x networks", "epochs, lr"]
    assert lines["lad"][5:12] == ["62.0 ± 1.4", "62.0 ± 1.4", "62.0 ± 1.4", "42.0 ± 1.4", "+2.0 ± 1.0", "2 x 2",
                                  "300, 0.05 to 0.051"]  # fmt: skip
    assert lines["lad, starting set"][5] == "60.0 ± 0.0" and lines["lad, starting set"][9] == ""
    assert lines["datm"][9] == "" and "datm, starting set" not in lines
    assert lines["random real, soft labels"][5] == "40.0 ± 0.0"
