"""Soft-label adjustment, DD-Ranking's scores and the paired comparison, against numbers worked out by hand."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from lad_dist.evaluate.labels import TAUS, adsa
from lad_dist.report import tables
from lad_dist.results.paired import added, differences, gains, not_compared, paired
from lad_dist.results.ranking import augmentation_robust_score, label_robust_score, scores

# --- labels -----------------------------------------------------------------------------------------------------------


def test_labels_that_are_biased_by_the_priors_get_back_their_balance():
    """Fair logits plus 0.8 log pi: tau 0.8 makes every class as confident as the others, which no other tau does."""
    counts, labels = (100, 10, 1), torch.arange(3).repeat_interleave(4)
    fair = 3.0 * torch.nn.functional.one_hot(labels, 3)
    log_priors = (torch.tensor(counts) / 111).log()
    p_SK, tau = adsa(fair + 0.8 * log_priors, labels, counts)
    assert tau == 0.8
    torch.testing.assert_close(p_SK, fair.softmax(1), rtol=1e-5, atol=1e-6)


def test_adjusted_labels_by_hand():
    logits, labels = torch.tensor([[1.0, 0.0], [0.5, 1.0]]), torch.tensor([0, 1])
    p_SK, tau = adsa(logits, labels, (9, 1))
    # own-class odds are e^(1 - tau log 9) and e^(0.5 + tau log 9): equal at tau = 0.25 / log 9 = 0.1138, 0.11 on the grid
    assert tau == 0.11
    gap = 1 - 0.11 * math.log(9)
    assert float(p_SK[0, 0]) == pytest.approx(1 / (1 + math.exp(-gap)), rel=1e-6)
    assert p_SK.sum(1).tolist() == pytest.approx([1, 1])


def test_balanced_data_and_labels_without_bias_are_left_alone():
    labels = torch.arange(4).repeat(3)
    logits = torch.nn.functional.one_hot(labels, 4).float()
    for counts in ((5, 5, 5, 5), (50, 20, 10, 5)):
        p_SK, tau = adsa(logits, labels, counts)
        assert tau == 0
        torch.testing.assert_close(p_SK, logits.softmax(1))
    assert TAUS[0] == 0 and TAUS[-1] == 3 and len(TAUS) == 301


# --- DD-Ranking -------------------------------------------------------------------------------------------------------


def test_label_robust_score_by_hand():
    """HLR = 0.8 - 0.5, IOR = 0.6 - 0.4; alpha = 0.5 * 0.2 - 0.5 * 0.3 = -0.05; (e^-0.05 - e^-1) / (e - e^-1)."""
    assert label_robust_score(0.8, 0.5, 0.6, 0.4) == pytest.approx(0.248192, abs=1e-6)
    assert label_robust_score(0.8, 0.5, 0.6, 0.4, weight=1.0) == pytest.approx(
        (math.exp(0.2) - math.exp(-1)) / (math.e - math.exp(-1))
    )
    assert label_robust_score(1.0, 0.0, 0.0, 1.0) == 0  # the worst
    assert label_robust_score(0.0, 1.0, 1.0, 0.0) == pytest.approx(1)
    assert label_robust_score(0.5, 0.5, 0.4, 0.4) == pytest.approx((1 - math.exp(-1)) / (math.e - math.exp(-1)))


def test_augmentation_robust_score_by_hand():
    """beta = 0.25 * (0.6 - 0.5) + 0.75 * (0.4 - 0.45) = -0.0125."""
    expected = (math.exp(-0.0125) - math.exp(-1)) / (math.e - math.exp(-1))
    assert augmentation_robust_score(0.6, 0.5, 0.4, 0.45, weight=0.25) == pytest.approx(expected)
    assert augmentation_robust_score(1, 0, 1, 0) == pytest.approx(1)


def test_percent_are_no_fractions():
    with pytest.raises(AssertionError, match="fractions"):
        label_robust_score(80, 50, 60, 40)


# --- pairs ------------------------------------------------------------------------------------------------------------


def rows(values: dict[int, float], source: str = "distilled", architecture: str = "convnet") -> list[dict]:
    return [{"source": source, "architecture": architecture, "seed": s, "overall": v} for s, v in values.items()]


def test_pairs_by_hand():
    """Differences 0.1, 0.2, 0.3: mean 0.2, deviation 0.1, error 0.1 / sqrt 3, t = 2 sqrt 3 with two degrees."""
    found = paired(rows({0: 0.5, 1: 0.7, 2: 0.9, 7: 0.1}), rows({2: 0.6, 1: 0.5, 0: 0.4, 8: 0.9}))
    assert found.seeds == (0, 1, 2) and found.differences == pytest.approx((0.1, 0.2, 0.3))
    assert found.mean == pytest.approx(0.2) and found.error == pytest.approx(0.1 / 3**0.5)
    assert found.t == pytest.approx(2 * 3**0.5) and found.degrees == 2
    low, high = found.interval
    assert low == pytest.approx(0.1, abs=0.02) and high == pytest.approx(0.3, abs=0.02)  # 1 in 27 is all of one kind
    assert found == paired(rows({0: 0.5, 1: 0.7, 2: 0.9}), rows({0: 0.4, 1: 0.5, 2: 0.6}))


def test_pairs_of_other_sources_architectures_and_figures():
    a, b = rows({0: 0.5}, "random", "resnet18"), rows({0: 0.4}, "random", "resnet18")
    assert paired(a, b) is None and paired(a, b, source="random", architecture="resnet18").mean == pytest.approx(0.1)
    assert paired(a, b, "ece", "random", "resnet18") is None


def test_one_pair_and_equal_differences_have_no_t():
    one = paired(rows({3: 0.5}), rows({3: 0.4}))
    assert (one.error, one.t, one.interval, one.degrees) == (None, None, None, 0)
    equal = paired(rows({0: 0.5, 1: 0.5}), rows({0: 0.5, 1: 0.5}))
    assert equal.mean == 0 and equal.error == 0 and equal.t is None and equal.interval == (0, 0)


def test_importing_the_comparison_is_cheap():
    code = "import sys, lad_dist.results.paired; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_scores_of_a_run_need_the_networks_that_they_compare():
    def row(source, overall, architecture="convnet"):
        return {"source": source, "architecture": architecture, "overall": overall}

    rows = [row("distilled", 0.6), row("distilled", 0.8), row("random", 0.3), row("full", 0.9), row("full", 0.9, "mlp")]
    rows.append(row("distilled-hard", 0.6))
    assert scores(rows) == {}  # random images with hard labels are not DD-Ranking's
    rows.append(row("random-soft", 0.5))
    assert scores(rows) == {"convnet": {"LRS": pytest.approx(label_robust_score(0.9, 0.6, 0.7, 0.5))}}
    rows += [row("distilled-plain", 0.4), row("random-plain", 0.2), row("random-soft-plain", 0.3)]
    assert scores(rows)["convnet"]["ARS"] == pytest.approx(augmentation_robust_score(0.7, 0.5, 0.4, 0.3))
    for of in rows:
        of["settings"] = {"epochs": 60 if of["source"] == "random-soft" else 2}
    assert scores(rows) == {}  # networks that were trained otherwise


def test_a_run_prints_its_scores_and_trains_plain_sets_without_augmentation(pipeline_of):
    from lad_dist import results
    from lad_dist.status.show import results_notes

    wanted = ["distilled-hard", "distilled-plain", "random-soft", "random-soft-plain", "full"]
    pipeline = pipeline_of("scored", evaluate={"seeds": 1, "baselines": wanted})
    pipeline.all()
    rows = {row["source"]: row for row in results.read(pipeline.run.results)}
    assert rows["distilled-plain"]["settings"]["augment"]["operations"] == []
    assert rows["distilled"]["settings"]["augment"]["operations"] != []
    for plain in ("distilled-plain", "random-soft-plain"):
        same = rows[plain.removesuffix("-plain")]
        assert rows[plain]["set_id"] == same["set_id"] and rows[plain]["settings"]["lr"] == same["settings"]["lr"]
    (note,) = [n for n in results_notes(list(rows.values())) if n.startswith("DD-Ranking")]
    assert "convnet: LRS 0." in note and ", ARS 0." in note


def test_compare_says_how_much_runs_differ_seed_by_seed(pipeline_of):
    from lad_dist import results
    from lad_dist.status import compare_notes

    folders = []
    for name, extra in (("one", (0.0, 0.0, 0.0)), ("two", (0.02, 0.04, 0.06))):
        run = pipeline_of(name).run
        base = {"source": "distilled", "architecture": "convnet"}
        results.write(
            run.results, [{**base, "seed": s, "overall": 0.5 + 0.1 * s + d, "tail": 0.4} for s, d in enumerate(extra)]
        )
        folders.append(run.root)
    overall, tail = compare_notes(folders)
    assert overall.startswith(
        "two - one, convnet, overall: +4.0 ± 1.2 (standard error) points over 3 paired seeds, t = 3.5 with 2"
    )
    assert tail == "two - one, convnet, tail: +0.0 ± 0.0 (standard error) points over 3 paired seeds"
    assert list(compare_notes(folders[:1])) == []


# --- what distilling added --------------------------------------------------------------------------------------------


def measured(source: str, values: list[float], architecture: str = "convnet", **fields) -> list[dict]:
    return [{"source": source, "architecture": architecture, "seed": seed, "split": "test", "overall": value,
             "tail": value - 0.1, **fields} for seed, value in enumerate(values)]  # fmt: skip


def test_the_gain_over_the_starting_set_is_paired():
    rows = [
        *measured("distilled", [0.52, 0.61, 0.70]),
        *measured("initial", [0.50, 0.60, 0.67]),
        *measured("random", [0.4]),
    ]
    (gain,) = gains(rows)
    assert (gain.reference, gain.architecture) == ("initial", "convnet") and set(gain.figures) == {"overall", "tail"}
    assert gain.figures["overall"].differences == pytest.approx((0.02, 0.01, 0.03))
    assert gain.figures["tail"].error == pytest.approx(0.01 / 3**0.5)
    assert added(rows) == ["distilled added +2.0 ± 0.6 points over its starting set"]


def test_no_gain_is_said_as_such():
    worse = [*measured("distilled", [0.50, 0.49]), *measured("initial", [0.51, 0.50])]
    assert added(worse) == ["distilled added nothing: -1.0 ± 0.0 points against its starting set, which has the same "
                            "kind of labels"]  # fmt: skip
    equal = [*measured("distilled", [0.5]), *measured("initial", [0.50001])]
    assert added(equal)[0].startswith("distilled added nothing: +0.0 points")
    unsure = [*measured("distilled", [0.50, 0.54]), *measured("initial", [0.50, 0.50])]
    assert added(unsure) == ["distilled added +2.0 ± 2.0 points over its starting set, less than two standard errors"]
    assert added(measured("distilled", [0.5])) == []


def test_the_reference_has_the_same_kind_of_labels():
    def rows(labels):
        return [r for s, of, at in (("distilled", labels, 0.6), ("random", "hard", 0.3), ("random-soft", "soft", 0.5))
                for r in measured(s, [at], settings={"epochs": 1, "labels": of})]  # fmt: skip

    assert [gain.reference for gain in gains(rows("hard"))] == ["random"]
    assert [gain.reference for gain in gains(rows("soft"))] == ["random-soft"]
    assert not_compared(rows("hard")) == [] == not_compared(rows("soft"))


def test_runs_that_were_trained_differently_are_said_to_be():
    ours, theirs = (measured("distilled", [0.5], settings={"epochs": 1, "network": {"width": w}}) for w in (8, 32))
    assert [(figure, changed) for _, figure, _, changed in differences(ours, theirs)] == [
        ("overall", ["network"]), ("tail", ["network"])]  # fmt: skip
    assert [changed for *_, changed in differences(ours, ours)] == [[], []]


def test_networks_on_other_images_or_of_another_protocol_are_no_pairs():
    start = measured("initial", [0.4, 0.4])
    assert gains([*measured("distilled", [0.5, 0.5], split="validation"), *start]) == []
    mixed = [*measured("distilled", [0.5, 0.5, 0.9], settings={"epochs": 9}), *start]
    mixed[2]["settings"] = {"epochs": 1}
    assert gains(mixed)[0].figures["overall"].seeds == (0, 1)
    settings = {"epochs": 9, "lr": 0.1, "labels": "soft", "augment": {"flip": 0.5}}
    for changed, pair in {
        "lr": True, "chosen_by": True, "epochs": False, "batch": False, "cutmix": False, "stored_views": False,
    }.items():  # fmt: skip
        rows = [
            *measured("distilled", [0.5], settings=settings),
            *measured("initial", [0.4], settings={**settings, changed: 5}),
        ]
        assert bool(gains(rows)) == pair and [c for _, _, c in not_compared(rows)] == ([] if pair else [[changed]])
        assert (
            any(f"are not compared in pairs: their {changed} differ" in n for n in tables.unpaired_notes(rows)) != pair
        )
    chosen = [measured(s, [0.5], settings={**settings, "epochs": n, "chosen": "on validation images"}) for s, n in
              (("distilled", 5), ("initial", 9))]  # fmt: skip
    assert gains([*chosen[0], *chosen[1]])
    for labels, pair in (("soft", True), ("teacher", False), ("stored", False)):
        rows = [r for s in ("distilled-teacher", "random-teacher")
                for r in measured(s, [0.5], settings={**settings, "labels": labels, "labelled_by": f"those of {s}"})]  # fmt: skip
        assert bool(gains(rows)) == pair


def test_another_architecture_is_named():
    rows = [*measured("distilled", [0.5], "resnet18"), *measured("initial", [0.4], "resnet18")]
    assert added(rows) == ["distilled added +10.0 points over its starting set (resnet18), one network each"]
