"""Objectives against values worked out by hand, and what is said of those that cannot be."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from limbeck.distill.objectives import OBJECTIVES, Objective, build_objectives
from limbeck.distill.objectives.base import Comparison, Pair, Ramp, Shape, Sides, value_at
from limbeck.errors import UsageError
from limbeck.models.tasks import get_task

SIMILARITY, CLASSIFICATION = get_task("sentence-similarity"), get_task("text-classification")
TOKENS, GENERATION, FILLING = get_task("token-classification"), get_task("text-generation"), get_task("fill-mask")
MASK = torch.tensor([[1, 1], [1, 0]])  # two texts, of two tokens and of one


def sides(width: int = 4, teacher_width: int = 4, heads: int = 2, teacher_heads: int = 2, depth: int = 2) -> Sides:
    return Sides(
        Shape(depth=depth, width=width, heads=heads, output_width=width),
        Shape(depth=4, width=teacher_width, heads=teacher_heads, output_width=teacher_width),
        lambda: np.eye(depth, 4),
    )


def build(name: str, task: Any = None, **settings: Any) -> Objective:
    kind = OBJECTIVES[name]
    return build_objectives({name: settings}, task or get_task(kind.tasks[0]), has_labels=True)[0]


def value(
    objective: Objective,
    student: Any,
    teacher: Any,
    task: Any,
    pair: str | None = None,
    done: float = 0.0,
    **batch: Any,
) -> float:
    """The loss where both sides hold one output (or the feature `pair`) of these numbers."""
    name = pair or task.output
    pairs = [Pair(name, name)] if pair else []
    ours, theirs = {name: torch.tensor(student)}, {name: torch.tensor(teacher)}
    view = objective.teacher_view(theirs, task, pairs)
    batch = {"attention_mask": MASK, **batch}
    return float(objective.loss(Comparison(ours, view, batch, task, pairs, None, done)))


# Logits.


def softened(logits: list[float], temperature: float = 2.0) -> list[float]:
    powers = [math.exp(logit / temperature) for logit in logits]
    return [power / sum(powers) for power in powers]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


STUDENT, TEACHER = [[1.0, 0.0, -1.0], [0.0, 3.0, 0.0]], [[2.0, 0.0, 0.5], [0.0, 0.5, 1.0]]


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_forward_kl_by_hand(temperature: float) -> None:
    each = [kl(softened(t, temperature), softened(s, temperature)) for s, t in zip(STUDENT, TEACHER, strict=True)]
    found = value(build("logits-kl", temperature=temperature), STUDENT, TEACHER, CLASSIFICATION)
    assert found == pytest.approx(temperature**2 * sum(each) / 2, rel=1e-5)


def test_reverse_kl_by_hand() -> None:
    each = [kl(softened(s), softened(t)) for s, t in zip(STUDENT, TEACHER, strict=True)]
    found = value(build("logits-kl", divergence="reverse"), STUDENT, TEACHER, CLASSIFICATION)
    assert found == pytest.approx(4 * sum(each) / 2, rel=1e-5)


@pytest.mark.parametrize("mix", [0.1, 0.5, 0.8])
def test_jensen_shannon_by_hand(mix: float) -> None:
    each = []
    for s, t in zip(map(softened, STUDENT), map(softened, TEACHER), strict=True):
        m = [mix * b + (1 - mix) * a for a, b in zip(s, t, strict=True)]
        each.append(mix * kl(t, m) + (1 - mix) * kl(s, m))
    found = value(build("logits-kl", divergence="jensen-shannon", mix=mix), STUDENT, TEACHER, CLASSIFICATION)
    assert found == pytest.approx(4 * sum(each) / 2, rel=1e-5)


def test_a_little_of_the_teacher_in_the_mixture_is_forward_kl() -> None:
    """The limit that GKD states: JS(b) / b goes to KL(teacher || student)."""
    mixed = value(build("logits-kl", divergence="jensen-shannon", mix=1e-3), STUDENT, TEACHER, CLASSIFICATION)
    assert mixed / 1e-3 == pytest.approx(value(build("logits-kl"), STUDENT, TEACHER, CLASSIFICATION), rel=2e-2)


def test_top_k_tells_the_rest_as_one_answer() -> None:
    student, teacher = [[1.0, 0.0, 2.0, -1.0], [0.0] * 4], [[0.0, 4.0, 1.0, 3.0], [5.0, 0.0, 0.0, 1.0]]
    each = []
    for s, t, (first, second) in zip(map(softened, student), map(softened, teacher), ((1, 3), (0, 3)), strict=True):
        p, q = ([side[first], side[second], 1 - side[first] - side[second]] for side in (t, s))
        each.append(kl(p, q))
    found = value(build("logits-kl", top_k=2), student, teacher, CLASSIFICATION)
    assert found == pytest.approx(4 * sum(each) / 2, rel=1e-5)


def test_top_k_of_all_answers_is_the_whole_divergence() -> None:
    for divergence in ("forward", "reverse", "jensen-shannon"):
        whole = value(build("logits-kl", divergence=divergence), STUDENT, TEACHER, CLASSIFICATION)
        for top_k in (2, 3, 50):
            found = value(build("logits-kl", divergence=divergence, top_k=top_k), STUDENT, TEACHER, CLASSIFICATION)
            assert found == pytest.approx(whole, rel=1e-5)


def test_top_k_keeps_little_of_the_teacher() -> None:
    logits = {"logits": torch.randn(3, 7, 1000)}
    view = build("logits-kl", task=GENERATION, top_k=8).teacher_view(logits, GENERATION, [])
    assert {name: tuple(tensor.shape) for name, tensor in view.items()} == {
        "logits.top_ids": (3, 7, 8),
        "logits.top_log_probabilities": (3, 7, 9),
    }
    assert view["logits.top_ids"].dtype == torch.int64
    assert torch.allclose(view["logits.top_log_probabilities"].exp().sum(-1), torch.ones(3, 7))


@pytest.mark.parametrize("settings", [{}, {"top_k": 1}])
@pytest.mark.parametrize("task", [TOKENS, FILLING, GENERATION], ids=lambda task: task.name)
def test_logits_of_tokens_are_compared_at_real_ones(task: Any, settings: dict[str, Any]) -> None:
    student = [[[1.0, 0.0], [0.0, 2.0]], [[1.0, 1.0], [50.0, -50.0]]]
    teacher = [[[0.0, 1.0], [0.0, 0.1]], [[2.0, 0.0], [-50.0, 50.0]]]
    real = [(teacher[i][j], student[i][j]) for i, j in ((0, 0), (0, 1), (1, 0))]
    by_hand = 4 * sum(kl(softened(t), softened(s)) for t, s in real) / 3
    assert value(build("logits-kl", task, **settings), student, teacher, task) == pytest.approx(by_hand, rel=1e-5)


def test_a_temperature_that_moves() -> None:
    objective = build("logits-kl", temperature={"start": 4, "end": 2})
    for done, temperature in ((0.0, 4.0), (0.5, 3.0), (1.0, 2.0)):
        constant = value(build("logits-kl", temperature=temperature), STUDENT, TEACHER, CLASSIFICATION)
        assert value(objective, STUDENT, TEACHER, CLASSIFICATION, done=done) == pytest.approx(constant)


def test_ramps() -> None:
    assert [value_at(Ramp(start=1, end=3), done) for done in (0, 0.25, 1)] == [1, 1.5, 3]
    cosine = [value_at(Ramp(start=4, end=0, shape="cosine"), done) for done in (0, 0.25, 0.5, 1)]
    assert cosine == pytest.approx([4, 2 + math.sqrt(2), 2, 0])
    assert value_at(0.5, 0.9) == 0.5


def cross_entropy(logits: list[float], label: int) -> float:
    return -math.log(softened(logits, 1.0)[label])


def labels_loss(logits: Any, labels: Any, task: Any) -> float:
    batch = {"labels": torch.tensor(labels), "attention_mask": MASK}
    seen = Comparison({"logits": torch.tensor(logits)}, {}, batch, task, [], None)
    return float(OBJECTIVES["labels"]().loss(seen))


def test_labels_is_the_cross_entropy_by_hand() -> None:
    by_hand = (cross_entropy([1, 0, -1], 0) + cross_entropy([0, 3, 0], 2)) / 2
    assert labels_loss(STUDENT, [0, 2], CLASSIFICATION) == pytest.approx(by_hand, rel=1e-5)


def test_labels_of_tokens_leave_out_what_has_none() -> None:
    logits = [[[1.0, 0.0, -1.0], [0.0, 3.0, 0.0], [9.0, 0.0, 0.0], [1.0, 1.0, 0.0]]]
    by_hand = (cross_entropy([1, 0, -1], 2) + cross_entropy([1, 1, 0], 0)) / 2
    for task in (TOKENS, FILLING):
        assert labels_loss(logits, [[2, -100, -1, 0]], task) == pytest.approx(by_hand, rel=1e-5)


def test_labels_of_the_next_token() -> None:
    logits = [[[2.0, 0.0], [0.0, 1.0], [9.0, 9.0]]]  # position t predicts token t + 1
    by_hand = (cross_entropy([2, 0], 0) + cross_entropy([0, 1], 0)) / 2
    assert labels_loss(logits, [[1, 0, 0]], GENERATION) == pytest.approx(by_hand, rel=1e-5)


def test_a_batch_without_any_label_adds_nothing_and_the_step_goes_through() -> None:
    logits = torch.ones(1, 2, 3, requires_grad=True)
    batch = {"labels": torch.full((1, 2), -100), "attention_mask": torch.ones(1, 2)}
    found = OBJECTIVES["labels"]().loss(Comparison({"logits": logits}, {}, batch, TOKENS, [], None))
    found.backward()
    assert float(found.detach()) == 0 and logits.grad is not None and not logits.grad.any()


# Token vectors.

OURS = [[[1.0, 2.0], [0.0, 0.0]], [[3.0, 3.0], [99.0, -99.0]]]
THEIRS = [[[1.0, 0.0], [2.0, 0.0]], [[4.0, 5.0], [7.0, 7.0]]]
# Squared differences 0 + 4, 4 + 0, 1 + 4 at the real tokens. The teacher's channels are 1, 2, 4 and 0, 0, 5, whose
# squared distances from their means 7/3 and 5/3 sum to 14/3 and 50/3: a student that knows the mean errs by as much.
RELATIVE_ERROR = 13 / (14 / 3 + 50 / 3)


def test_hidden_states_mse_by_hand() -> None:
    found = value(build("hidden-states", SIMILARITY), OURS, THEIRS, SIMILARITY, pair="hidden.0")
    assert found == pytest.approx(RELATIVE_ERROR)
    mean = [[[7 / 3, 5 / 3]] * 2] * 2
    assert value(build("hidden-states", SIMILARITY), mean, THEIRS, SIMILARITY, pair="hidden.0") == pytest.approx(1)


def test_hidden_states_cosine_by_hand() -> None:
    # Cosines of (1, 2)(1, 0), (0, 0)(2, 0) and (3, 3)(4, 5).
    cosines = (1 / math.sqrt(5), 0.0, 27 / math.sqrt(18 * 41))
    found = value(build("hidden-states", SIMILARITY, distance="cosine"), OURS, THEIRS, SIMILARITY, pair="hidden.0")
    assert found == pytest.approx(1 - sum(cosines) / 3, rel=1e-5)


def test_embedding_layer_by_hand() -> None:
    found = value(build("embedding-layer", SIMILARITY), OURS, THEIRS, SIMILARITY, pair="embeddings")
    assert found == pytest.approx(RELATIVE_ERROR)


def test_tokens_that_are_all_alike_do_not_blow_up_the_error() -> None:
    alike = [[[3.0, 4.0]] * 2] * 2
    off = [[[3.0, 4.1]] * 2] * 2
    found = value(build("hidden-states", SIMILARITY), off, alike, SIMILARITY, pair="hidden.0")
    assert found == pytest.approx((0.01 / 2) / (1e-3 * 25 / 2), rel=1e-3)  # in units of a thousandth of the mean square


def test_widths_that_differ_are_bridged_by_a_projection_for_each_pair() -> None:
    objective = build("hidden-states", SIMILARITY, layers={0: 1, 1: 3})
    learned = objective.learned(sides(width=2, teacher_width=3))
    assert [tuple(module.weight.shape) for module in learned] == [(3, 2), (3, 2)]  # type: ignore[union-attr, arg-type]
    with torch.no_grad():
        for module in learned:  # type: ignore[union-attr]
            module.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
            module.bias.fill_(1.0)
    ours = {"hidden.0": torch.tensor(OURS), "hidden.1": torch.tensor(OURS)}
    exact = torch.cat([torch.tensor(OURS), torch.tensor(OURS).sum(-1, keepdim=True)], dim=-1) + 1
    pairs = objective.pairs(sides())
    view = objective.teacher_view({"hidden.1": exact, "hidden.3": exact, "hidden.2": exact}, SIMILARITY, pairs)
    assert set(view) == {"hidden.1", "hidden.3"}
    seen = Comparison(ours, view, {"attention_mask": MASK}, SIMILARITY, pairs, learned)
    assert float(objective.loss(seen).detach()) == pytest.approx(0, abs=1e-6)
    assert objective.learned(sides()) is None


# Attention.


def test_attention_maps_by_hand() -> None:
    ours = [[[[0.5, 0.5], [0.9, 0.1]]], [[[1.0, 0.0], [0.3, 0.7]]]]
    theirs = [[[[0.2, 0.8], [0.6, 0.4]]], [[[1.0, 0.0], [0.6, 0.4]]]]
    # Three real queries; the one of the second text has a single key, so nothing to differ in.
    by_hand = (kl([0.2, 0.8], [0.5, 0.5]) + kl([0.6, 0.4], [0.9, 0.1]) + 0) / 3
    found = value(build("attention-maps", SIMILARITY), ours, theirs, SIMILARITY, pair="attention.0")
    assert found == pytest.approx(by_hand, rel=1e-5)


def test_attention_that_dropout_has_removed_is_left_out() -> None:
    ours = [[[[0.0, 0.75], [1.0, 0.2]]]]  # a half dropped, the others scaled
    theirs = [[[[0.9, 0.1], [0.6, 0.4]]]]
    batch = {"attention_mask": torch.tensor([[1, 1]])}
    by_hand = kl([0.6, 0.4], [1 / 1.2, 0.2 / 1.2]) / 2
    found = value(build("attention-maps", SIMILARITY), ours, theirs, SIMILARITY, pair="attention.0", **batch)
    assert found == pytest.approx(by_hand, rel=1e-5)


def relations(vectors: list[list[float]]) -> list[list[float]]:
    """softmax(A A' / sqrt(width)) of a text's vectors."""
    scores = [[sum(a * b for a, b in zip(x, y, strict=True)) / math.sqrt(len(x)) for y in vectors] for x in vectors]
    return [softened(row, 1.0) for row in scores]


def test_attention_relations_by_hand() -> None:
    ours = [[[1.0, 0.5, -1.0, 0.0], [0.0, 1.0, 0.5, 2.0]], [[3.0] * 4, [9.0] * 4]]
    theirs = [[[0.0, 1.0], [2.0, 0.5]], [[1.0, 1.0], [-9.0, 9.0]]]  # half as wide
    kls = []
    for head in range(2):
        s = relations([row[2 * head : 2 * head + 2] for row in ours[0]])
        t = relations([row[head : head + 1] for row in theirs[0]])
        kls += [kl(t[0], s[0]), kl(t[1], s[1]), 0.0]  # the one token of the second text relates to itself alone
    found = value(build("attention-relations", SIMILARITY, heads=2), ours, theirs, SIMILARITY, pair="key.0")
    assert found == pytest.approx(sum(kls) / 6, rel=1e-5)


def test_attention_relations_compare_queries_keys_and_values_of_the_last_layers() -> None:
    pairs = build("attention-relations", SIMILARITY).pairs(sides(width=6, teacher_width=8, heads=3, teacher_heads=4))
    assert pairs == [Pair("query.1", "query.3"), Pair("key.1", "key.3"), Pair("value.1", "value.3")]


@pytest.mark.parametrize(("ours", "theirs", "heads"), [(384, 768, 12), (512, 768, 8), (64, 64, 8), (5, 7, 1)])
def test_relation_heads_divide_both_widths(ours: int, theirs: int, heads: int) -> None:
    student, teacher = torch.randn(2, 2, ours).tolist(), torch.randn(2, 2, theirs).tolist()
    by_default = value(build("attention-relations", SIMILARITY), student, teacher, SIMILARITY, pair="query.0")
    named = value(build("attention-relations", SIMILARITY, heads=heads), student, teacher, SIMILARITY, pair="query.0")
    assert by_default == pytest.approx(named)


# Sentence embeddings.


def test_embedding_cosine_by_hand() -> None:
    student, teacher = [[3.0, 4.0], [1.0, 0.0], [2.0, 0.0]], [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]
    # The cosines are 0.6, 0 and -1; lengths do not matter.
    found = value(build("embedding-cosine"), student, teacher, SIMILARITY)
    assert found == pytest.approx((0.4 + 1 + 2) / 3)


def test_pairwise_similarity_by_hand() -> None:
    student, teacher = [[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]], [[1.0, 0, 0], [5.0, 0, 0], [0, 1.0, 0]]
    # Cosines of the pairs 12, 13, 23: the student's 0, 0.6, 0.8; the teacher's 1, 0, 0.
    assert value(build("pairwise-similarity"), student, teacher, SIMILARITY) == pytest.approx((1.0 + 0.36 + 0.64) / 3)


def test_relational_by_hand() -> None:
    student = [[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]]  # distances 3, 4, 5, a right angle at the first
    teacher = [[0.0, 0.0, 1.0], [6.0, 0.0, 1.0], [3.0, 0.0, 1.0]]  # 6, 3, 3 on a line, the third in the middle

    def huber(difference: float) -> float:
        return difference**2 / 2 if abs(difference) <= 1 else abs(difference) - 0.5

    distance = sum(huber(s / 4 - t / 4) for s, t in ((3, 6), (4, 3), (5, 3))) / 3
    angle = (huber(0 - 1) + huber(0.6 - 1) + huber(0.8 + 1)) / 3
    for weight in (0.0, 0.5, 2.0):
        found = value(build("relational", angle=weight), student, teacher, SIMILARITY)
        assert found == pytest.approx(distance + weight * angle, rel=1e-5)


def test_texts_that_coincide_span_no_angle() -> None:
    student = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [2.0, 2.0]], requires_grad=True)
    teacher = {"sentence_embedding": torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0], [1.0, 2.0]])}
    seen = Comparison({"sentence_embedding": student}, teacher, {}, SIMILARITY, [], None)
    build("relational").loss(seen).backward()
    assert student.grad is not None and bool(student.grad.isfinite().all()) and float(student.grad.abs().max()) < 10


def test_contrastive_by_hand() -> None:
    student, teacher = [[3.0, 4.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]
    # Cosines 0.6, 0.8 and 1, 0: each text against both vectors of the teacher.
    by_hand = (cross_entropy([0.6 / 0.5, 0.8 / 0.5], 0) + cross_entropy([1 / 0.5, 0], 1)) / 2
    found = value(build("contrastive", temperature=0.5), student, teacher, SIMILARITY)
    assert found == pytest.approx(by_hand, rel=1e-5)


def test_queue_similarity_by_hand_and_its_oldest_vectors_fall_out() -> None:
    objective = build("queue-similarity", temperature=0.5, size=3)
    queue = objective.learned(sides(width=2, teacher_width=2))

    def loss(student: list[list[float]], teacher: list[list[float]]) -> float:
        ours, theirs = ({"sentence_embedding": torch.tensor(side)} for side in (student, teacher))
        return float(objective.loss(Comparison(ours, theirs, {}, SIMILARITY, [], queue)))

    def by_hand(student: list[float], teacher: list[float]) -> float:
        p, q = (np.exp(np.array(cosines) / 0.5) for cosines in (teacher, student))
        return float(np.sum(p / p.sum() * np.log(p / p.sum() / (q / q.sum()))))

    assert loss([[0.6, 0.8]], [[1.0, 0.0]]) == pytest.approx(0, abs=1e-6), "one vector can be told from no other"
    assert loss([[0.6, 0.8]], [[0.0, 2.0]]) == pytest.approx(by_hand([0.6, 0.8], [0, 1]), rel=1e-5)
    loss([[1.0, 0.0]], [[-1.0, 0.0]])
    # The first vector's place is taken: what is left are up, left and the new one.
    assert loss([[0.6, 0.8]], [[0.8, 0.6]]) == pytest.approx(by_hand([0.96, 0.8, -0.6], [1, 0.6, -0.8]), rel=1e-5)


@pytest.mark.parametrize("name", ["pairwise-similarity", "relational", "contrastive"])
def test_one_text_alone_teaches_nothing_in_a_batch(name: str) -> None:
    one = torch.tensor([[1.0, 2.0]], requires_grad=True)
    found = build(name).loss(
        Comparison({"sentence_embedding": one}, {"sentence_embedding": one.detach()}, {}, SIMILARITY, [], None)
    )
    found.backward()
    assert float(found.detach()) == pytest.approx(0, abs=1e-6)
    assert one.grad is not None and bool(one.grad.isfinite().all())


@pytest.mark.parametrize("name", ["embedding-cosine", "contrastive"])
def test_embeddings_of_other_widths_need_a_projection(name: str) -> None:
    wider = sides(width=2, teacher_width=3)
    with pytest.raises(UsageError, match=f"{name}.*have 2 and 3 channels") as error:
        build(name).learned(wider)
    assert error.value.hint and "project: true" in error.value.hint
    learned = build(name, project=True).learned(wider)
    assert tuple(learned.weight.shape) == (3, 2)  # type: ignore[union-attr]
    assert build(name, project=True).learned(sides()) is None


def test_relation_heads_that_do_not_divide_a_width_are_refused() -> None:
    vectors = torch.randn(2, 2, 8).tolist()
    with pytest.raises(UsageError, match=r"cannot split key.0 of width 8 .* into 3 relation heads"):
        value(build("attention-relations", SIMILARITY, heads=3), vectors, vectors, SIMILARITY, pair="key.0")
