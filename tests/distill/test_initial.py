"""The initial synthetic set: which images, and which labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lad_dist.distill.initial import build, choose_images, label_logits, vary_repeats
from lad_dist.distill.start import _of_whole_passes
from lad_dist.distilled import HARD_LABEL_LOGIT
from lad_dist.recipe import AugmentConfig

LABELS = np.repeat([0, 1, 2], [6, 4, 3])
CLASSES = 3


class Experts:
    """Two experts whose logits are chosen per training image: ``right[e]`` are the images that expert e classifies."""

    def __init__(self, *right: set[int]) -> None:
        draws = torch.Generator().manual_seed(0)
        self.logits = torch.rand(len(right), len(LABELS), CLASSES, generator=draws)
        for e, mine in enumerate(right):
            for i, c in enumerate(LABELS.tolist()):
                self.logits[e, i, c if i in mine else (c + 1) % CLASSES] += 5

    def __call__(self, expert: int, indices: np.ndarray) -> torch.Tensor:
        return self.logits[expert, torch.from_numpy(indices)]


def made(experts: Experts, ipc: int = 2, seed: int = 0, **fields):
    options = {"only_correct": True, "hard_labels": False} | fields
    return build(experts, range(len(experts.logits)), LABELS, ipc, CLASSES, seed=seed, **options)


def test_order_is_class_major():
    found = made(Experts(set(range(13)), set(range(13))), ipc=3)
    assert LABELS[found.indices_S].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert len(set(found.indices_S.tolist())) == 9
    assert found.logits_SK.shape == (9, 3) and (found.without_expert, found.repeated) == (0, 0)


def test_only_images_that_the_choosing_expert_classifies():
    right = {0, 3, 5, 6, 9, 10, 12}
    for seed in range(8):
        found = made(Experts(right, right), seed=seed)
        assert set(found.indices_S.tolist()) <= right
    anything = [made(Experts(right, right), seed=seed, only_correct=False).indices_S.tolist() for seed in range(30)]
    assert {i for indices in anything for i in indices} == set(range(13))


def test_one_expert_chooses_for_all_classes():
    first, second = {0, 1, 6, 7, 10, 11}, {2, 3, 8, 9, 12}
    choices = [set(made(Experts(first, second), ipc=1, seed=seed).indices_S.tolist()) for seed in range(20)]
    assert all(c <= first or c <= second for c in choices)
    assert any(c <= first for c in choices) and any(c <= second for c in choices)


def test_too_few_are_repeated():
    found = made(Experts({0, 1, 2, 3, 6, 10, 11}), ipc=4)
    by_class = found.indices_S.reshape(3, 4)
    assert sorted(by_class[0]) == [0, 1, 2, 3]
    assert by_class[1].tolist() == [6, 6, 6, 6]
    assert sorted(by_class[2]) == [10, 10, 11, 11]
    assert found.repeated == 3 + 2 and found.without_expert == 0


def test_none_correct_takes_random_images_of_the_class_and_its_mean_logits():
    experts = Experts({0, 1, 2, 6, 7}, {0, 1, 2, 6, 7})  # nobody classifies class 2
    found = made(experts, ipc=2)
    assert set(found.indices_S[4:].tolist()) <= {10, 11, 12} and len(set(found.indices_S[4:].tolist())) == 2
    mean = experts.logits[:, 10:13].mean(dim=(0, 1))
    torch.testing.assert_close(found.logits_SK[4], mean)
    torch.testing.assert_close(found.logits_SK[5], mean)
    assert found.without_expert == 2 and found.repeated == 0


def test_labels_are_the_mean_over_the_experts_that_are_right():
    experts = Experts({0, 1, 6, 10}, {1, 6, 10}, {10})
    logits = experts.logits[:, [0, 1, 10, 12]]
    mean, count = label_logits(logits, torch.from_numpy(LABELS[[0, 1, 10, 12]]))
    assert count.tolist() == [1, 2, 3, 0]
    torch.testing.assert_close(mean[0], logits[0, 0])
    torch.testing.assert_close(mean[1], logits[:2, 1].mean(0))
    torch.testing.assert_close(mean[2], logits[:, 2].mean(0))
    assert mean[3].tolist() == [0, 0, 0]


def test_hard_labels_are_one_hot():
    found = made(Experts({0, 1, 6, 7, 10, 11}), hard_labels=True)
    one_hot = torch.nn.functional.one_hot(torch.tensor([0, 0, 1, 1, 2, 2]), 3).float()
    assert torch.equal(found.logits_SK, HARD_LABEL_LOGIT * one_hot)
    torch.testing.assert_close(found.logits_SK.softmax(1), one_hot, rtol=0, atol=1e-40)
    assert found.without_expert == 0


def test_a_function_of_the_seed():
    experts = Experts(set(range(13)))
    choices = [made(experts, seed=seed).indices_S.tolist() for seed in range(6)]
    assert choices == [made(experts, seed=seed).indices_S.tolist() for seed in range(6)]
    assert len({tuple(c) for c in choices}) > 1


def test_an_earlier_class_has_no_say_in_a_later_ones_choice():
    whole, _ = choose_images(None, LABELS, 2, 3, seed=1)
    fewer, _ = choose_images(None, np.where(np.arange(13) < 2, 1, LABELS), 2, 3, seed=1)
    assert whole[4:].tolist() == fewer[4:].tolist()


@pytest.mark.parametrize("ipc", [1, 7])
def test_counts(ipc):
    indices, repeated = choose_images(None, LABELS, ipc, 3, seed=0)
    assert len(indices) == 3 * ipc and repeated == sum(max(0, ipc - n) for n in (6, 4, 3))


def test_herding_chooses_among_the_correctly_classified():
    labels = np.array([0] * 6 + [1] * 6)
    logits = torch.zeros(12, 2)
    logits[torch.arange(12), torch.from_numpy(labels)] = 1.0
    logits[0] = torch.tensor([0.0, 1.0])  # misclassified, though nearest to the mean of its class
    features = torch.randn(12, 4, generator=torch.Generator().manual_seed(1))
    features[0] = torch.nn.functional.normalize(features[:6], dim=1).mean(0)
    chosen, repeated = choose_images(logits.argmax(1), labels, 2, 2, seed=0, features_ND=features)
    assert 0 not in chosen and repeated == 0 and labels[chosen].tolist() == [0, 0, 1, 1]
    again, _ = choose_images(logits.argmax(1), labels, 2, 2, seed=99, features_ND=features)
    assert again.tolist() == chosen.tolist()


def test_one_expert_labels_with_its_raw_logits_wrong_ones_too():
    experts = Experts({0, 1, 6}, {2, 3, 10})
    for only_correct in (True, False):
        found = made(experts, one_expert=True, only_correct=only_correct)
        by_expert = [torch.equal(found.logits_SK, experts(e, found.indices_S)) for e in range(2)]
        assert by_expert.count(True) == 1 and found.without_expert == 0
    wrong = found.logits_SK.argmax(dim=1).numpy() != LABELS[found.indices_S]
    assert wrong.any()
    drawn = {made(experts, one_expert=True, only_correct=False, seed=s).logits_SK[0].argmax().item() for s in range(9)}
    assert len(drawn) > 1  # not always the same expert


INDICES = np.array([4, 4, 4, 7, 2, 2])


def pictures() -> torch.Tensor:
    return torch.rand(13, 3, 8, 8, generator=torch.Generator().manual_seed(3))[torch.from_numpy(INDICES)]


def test_copies_start_from_augmented_images():
    varied = vary_repeats(pictures(), INDICES, 5, AugmentConfig())
    same = [torch.equal(a, b) for a, b in zip(varied, pictures(), strict=True)]
    assert same == [True, False, False, True, True, False]
    assert not torch.equal(varied[1], varied[2])
    assert torch.equal(varied, vary_repeats(pictures(), INDICES, 5, AugmentConfig()))
    assert not torch.equal(varied, vary_repeats(pictures(), INDICES, 6, AugmentConfig()))


def test_a_copy_that_a_draw_left_as_it_was_is_drawn_again():
    flips = AugmentConfig(operations=("flip",))
    changed = [vary_repeats(pictures(), INDICES, seed, flips)[5] for seed in range(12)]
    assert sum(torch.equal(image, pictures()[5].flip(2)) for image in changed) == 12


def test_without_augmentation_copies_are_copies():
    assert torch.equal(vary_repeats(pictures(), INDICES, 5, AugmentConfig(operations=())), pictures())


def test_parts_of_experts_logits_are_those_of_the_whole(monkeypatch):
    """Many images times classes do not fit: then a part at a time, and predictions in place of logits."""
    experts = {e: torch.randn(13, 3, generator=torch.Generator().manual_seed(e)) for e in range(3)}
    asked = []

    def logits_of(expert: int, indices: np.ndarray) -> torch.Tensor:
        asked.append(len(indices))
        return experts[expert][torch.from_numpy(indices)]

    def start(**more):
        return build(logits_of, range(3), LABELS, 4, 3, seed=0, only_correct=True, hard_labels=False, **more)

    whole = start()
    monkeypatch.setattr("lad_dist.distill.initial.PASS", 5)
    monkeypatch.setattr("lad_dist.distill.initial.MOST_BYTES", 1)
    asked.clear()
    parts = start(predicted_of=lambda e: experts[e].argmax(1))
    assert torch.equal(whole.logits_SK, parts.logits_SK) and np.array_equal(whole.indices_S, parts.indices_S)
    assert whole.without_expert == parts.without_expert and 13 not in asked


def test_rows_of_whole_passes_are_those_of_a_pass_over_everything(monkeypatch):
    monkeypatch.setattr("lad_dist.distill.initial.PASS", 4)
    table, asked = torch.randn(10, 3), []

    def logits_of(rows: np.ndarray) -> torch.Tensor:
        asked.append(rows.tolist())
        return table[torch.from_numpy(rows)]

    indices = np.array([9, 0, 3, 9, 8])
    assert torch.equal(_of_whole_passes(logits_of, indices, 10), table[torch.from_numpy(indices)])
    assert asked == [[0, 1, 2, 3], [8, 9]]
