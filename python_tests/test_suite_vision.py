"""The suite's vision tasks: bundled pictures, architectures, cached training, precision, Frechet distance."""

import dataclasses
import json

import pytest
import torch
from safetensors import safe_open
from torch import nn

from pysparse.calib.batches import own_batches
from pysparse.methods import FCPTS, learn_rates
from pysparse.models.discover import discover
from pysparse.suite.tasks import TASKS, task_for
from pysparse.suite.vision import detectors, generators
from pysparse.suite.vision.architectures import ARCHITECTURES
from pysparse.suite.vision.average_precision import (
    Detections,
    average_precision,
    detections,
    mean_average_precision,
)
from pysparse.suite.vision.checkpoints import Lesson, trained
from pysparse.suite.vision.detector import (
    BACKBONES,
    Detector,
    Found,
    centres,
    detection_loss,
    generalised_iou,
    iou_matrix,
)
from pysparse.suite.vision.frechet import frechet_distance
from pysparse.suite.vision.generator import GENERATORS, LATENT, samples
from pysparse.suite.vision.pixels import TRAIN_DIGITS, digits, photographs, pictures
from pysparse.suite.vision.scenes import scenes
from pysparse.suite.vision.training import Training, fit, shuffled

CELL = 1e-5  # of pixels and scores: float32 sums of some thousand terms of about one


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PYSPARSE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "suite"


# Data


def test_the_splits_share_no_digit_and_no_photograph():
    (train, train_labels), (test, test_labels) = digits("train"), digits("test")
    assert len(train) == TRAIN_DIGITS
    assert len(train) + len(test) == 1797
    assert set(train_labels.tolist()) == set(test_labels.tolist()) == set(range(10))
    rows = {bytes(one.numpy().tobytes()) for one in train}
    assert not any(bytes(one.numpy().tobytes()) in rows for one in test)
    left, right = photographs("train"), photographs("test")
    assert left.shape == right.shape
    assert all((a - b).abs().mean() > 0.02 for a, b in zip(left, right, strict=True))


def test_pictures_are_those_of_their_seed():
    first, again, other = pictures("test", 1, 3), pictures("test", 1, 3), pictures("test", 1, 4)
    assert first.images.shape == (597, 3, 32, 32)
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.labels, digits("test")[1])
    assert (first.images - other.images).abs().mean() > 0.1
    assert first.images.std() == pytest.approx(1.0, abs=0.5)


def test_a_box_holds_its_digit_and_nothing_beyond():
    found = scenes("train", 40, 5)
    there = found.labels >= 0
    assert there.any()
    assert not there.all()
    assert torch.equal(found.boxes[~there], torch.zeros(int((~there).sum()), 4))
    width, height = (found.boxes[..., 2:] - found.boxes[..., :2]).unbind(-1)
    assert ((width[there] >= 3) & (width[there] <= 32) & (height[there] >= 8) & (height[there] <= 32)).all()
    empty = scenes("train", 40, 5)
    assert torch.equal(found.images, empty.images)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pictures("test", 0, 1), "copies=0"),
        (lambda: pictures("valid", 1, 1), "'valid'"),
        (lambda: scenes("test", 0, 1), "count=0"),
        (lambda: Training(0, 1e-3), "epochs=0"),
        (lambda: task_for("classification", {"copies": 0}), "copies=0"),
        (lambda: task_for("detection", {"scene": 3}), "did you mean 'scenes'"),
        (lambda: task_for("generation", {"steps": -1}), "steps=-1"),
        (lambda: FCPTS(loss="l1"), "'l1'"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Architectures


def test_there_are_a_dozen_architectures_of_two_families():
    families = [one.family for one in ARCHITECTURES.values()]
    assert families.count("cnn") >= 6
    assert families.count("attention") >= 6


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_classifies_and_all_of_it_is_prunable(name):
    torch.manual_seed(0)
    model = ARCHITECTURES[name].build().eval()
    logits = model(pixel_values=torch.randn(1, 3, 32, 32)).logits
    assert logits.shape == (1, 10)
    assert torch.isfinite(logits).all()
    layout = discover(model, ("Linear", "Conv2d"), (), whole=True)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert total < 700_000
    assert layout.size > 0.9 * total


@pytest.mark.parametrize("name", BACKBONES)
def test_a_detector_has_a_box_for_every_position(name):
    torch.manual_seed(0)
    model = Detector(BACKBONES[name])
    batch = scenes("train", 2, 1)
    found = model(batch.images)
    assert found.logits.shape == (2, 256, 10)
    assert found.boxes.shape == (2, 256, 4)
    loss = detection_loss(model, batch)
    loss.backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None and "mask_token" not in n]
    assert torch.isfinite(loss)
    assert len(missing) <= 2, missing  # the norms of stages that are not read


@pytest.mark.parametrize("name", GENERATORS)
def test_generators_make_digits_from_the_same_noise(name):
    torch.manual_seed(0)
    made = GENERATORS[name].build().eval()
    first, again = (samples(made, GENERATORS[name].kind, 3, 5, steps=2) for _ in range(2))
    assert first.shape == (3, 1, 8, 8)
    assert torch.equal(first, again)


def test_a_flow_that_knows_the_velocity_arrives():
    class Straight(nn.Module):
        def forward(self, sample, timestep):
            return (torch.ones_like(sample) - sample) / (1 - timestep)[:, None, None, None]

    made = samples(Straight(), "flow", 4, 0, steps=10)
    assert torch.allclose(made, torch.ones(4, 1, 8, 8), atol=CELL)


# Detection


def test_overlaps_by_hand():
    left = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 0.0, 0.0]])
    right = torch.tensor([[2.0, 0.0, 6.0, 4.0], [10.0, 0.0, 14.0, 4.0]])
    assert torch.allclose(iou_matrix(left, right), torch.tensor([[8 / 24, 0.0], [0.0, 0.0]]))
    pairs = generalised_iou(left[:1].expand(2, 4), right)
    # apart by 6: union 32, box around 14 x 4 = 56
    assert torch.allclose(pairs, torch.tensor([8 / 24, 0.0 - 24 / 56]))
    assert torch.equal(centres(2), torch.tensor([[2.0, 2.0], [6.0, 2.0], [2.0, 6.0], [6.0, 6.0]]))


def test_average_precision_by_hand():
    hits = torch.tensor([True, False, True, False])
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6])
    # precision 1 at recall 1/3 and 2/3 at recall 2/3; one object of three is never found
    assert average_precision(hits, scores, 3) == pytest.approx(1 / 3 + 2 / 9)
    # a later, better precision counts for what came before: hits in places 2, 3: 2/3 each
    assert average_precision(torch.tensor([False, True, True]), scores[:3], 2) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="total=0"):
        average_precision(hits, scores, 0)


def test_each_object_is_found_once():
    boxes = torch.tensor([[[0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0]]])
    labels = torch.tensor([[3, 3]])

    def precision(found, scores, classes):
        one = Detections(torch.tensor(found), torch.tensor(scores), torch.tensor(classes))
        return mean_average_precision([one], boxes, labels, 10)

    first, second = [0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0]
    assert precision([first, second], [0.9, 0.8], [3, 3]) == pytest.approx(1.0)
    assert precision([first, first], [0.9, 0.8], [3, 3]) == pytest.approx(0.5)  # a duplicate is a false alarm
    assert precision([first, second], [0.9, 0.8], [3, 4]) == pytest.approx(0.5)
    assert precision([[0.0, 0.0, 10.0, 4.9]], [0.9], [3]) == pytest.approx(0.0)  # overlap 0.49
    with pytest.raises(ValueError, match="no image has an object"):
        mean_average_precision([], torch.zeros(0, 2, 4), torch.zeros(0, 2, dtype=torch.long), 10)


def test_boxes_of_one_class_that_overlap_are_one_detection():
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 9.0], [0.0, 0.0, 10.0, 9.0]])
    logits = torch.full((3, 2), -9.0)
    logits[0, 0], logits[1, 0], logits[2, 1] = 2.0, 3.0, 1.0
    found = detections(logits, boxes)
    assert found.labels.tolist() == [0, 1]
    assert torch.allclose(found.scores, torch.tensor([3.0, 1.0]).sigmoid())
    assert torch.equal(found.boxes[0], boxes[1])


def test_a_perfect_detector_has_precision_one():
    truth = scenes("test", 30, 2)

    class Oracle(nn.Module):
        def forward(self, images):
            rows = [int((truth.images == one).flatten(1).all(1).nonzero()) for one in images]
            logits = nn.functional.one_hot(truth.labels[rows].clamp(min=0), 10) * 20.0 - 10.0
            logits[truth.labels[rows] < 0] = -10.0
            return Found(logits, truth.boxes[rows])

    assert detectors.precision(Oracle(), truth) == pytest.approx(1.0)


# Frechet distance


def test_frechet_distance_of_normal_distributions():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(500, 3, generator=generator, dtype=torch.float64)
    assert frechet_distance(rows, rows) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(rows, rows + torch.tensor([3.0, 0.0, 4.0])) == pytest.approx(25.0, rel=1e-9)
    # scaled by 2: sum over eigenvalues of (sqrt(4 v) - sqrt(v))^2 = trace
    centred = rows - rows.mean(0)
    assert frechet_distance(centred, 2 * centred) == pytest.approx(float(rows.T.cov().trace()), rel=1e-9)


@pytest.mark.parametrize(
    ("left", "message"), [(torch.zeros(1, 2), "1 and 3 rows"), (torch.full((3, 2), torch.nan), "no numbers")]
)
def test_frechet_distance_refuses_what_has_no_covariance(left, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(left, torch.zeros(3, 2))


# Training and its cache


def line_lesson(epochs=2, seen=None):
    """A layer that learns y = x in a moment."""

    def teach(model, training, seed):
        if seen is not None:
            seen.append(seed)
        data = torch.randn(64, 4, generator=torch.Generator().manual_seed(9))

        def batches(epoch_seed):
            for rows in shuffled(64, training.batch_size, epoch_seed):
                yield data[rows]

        return fit(model, training, batches, lambda net, x: nn.functional.mse_loss(net(x), x), seed)

    return Lesson("test", "line", {"width": 4}, Training(epochs, 0.05, 16), lambda: nn.Linear(4, 4), teach)


def test_weights_are_trained_once_and_are_those_of_their_seed(cache):
    seen = []
    lesson = line_lesson(seen=seen)
    first, again, other = trained(lesson, 0), trained(lesson, 0), trained(lesson, 1)
    assert seen == [0, 1]
    assert torch.equal(first.weight, again.weight)
    assert not torch.equal(first.weight, other.weight)
    written = lesson.path(0).read_bytes()
    lesson.path(0).unlink()
    trained(lesson, 0)
    assert lesson.path(0).read_bytes() == written
    with safe_open(lesson.path(0), "pt") as file:
        assert json.loads(file.metadata()["lesson"]) == lesson.identity(0)
    assert not list(cache.glob("*.part"))


def test_another_recipe_is_another_file(cache):
    changed = dataclasses.replace(line_lesson(), settings={"width": 5})
    assert len({line_lesson().path(0), line_lesson(3).path(0), line_lesson().path(1), changed.path(0)}) == 4
    assert line_lesson().path(0).parent == cache


def test_a_cached_file_of_another_kind_is_refused(cache):
    lesson = line_lesson()
    lesson.path(0).parent.mkdir(parents=True)
    lesson.path(0).write_bytes(b"no weights")
    with pytest.raises(ValueError, match="delete it to train anew"):
        trained(lesson, 0)


def test_a_training_that_fails_leaves_nothing(cache):
    def teach(model, training, seed):
        return fit(model, training, lambda _: iter([0]), lambda net, _: net.weight.sum() * torch.nan, seed)

    lesson = dataclasses.replace(line_lesson(), teach=teach)
    with pytest.raises(FloatingPointError, match="epoch 0"):
        trained(lesson, 0)
    assert not list(cache.glob("*.safetensors"))
    assert not list(cache.glob("*.part"))


# Tasks


@pytest.mark.parametrize("name", ["classification", "detection", "generation"])
def test_a_vision_task_lists_models_of_both_families(name):
    task = task_for(name)
    assert name in TASKS
    assert {"cnn", "attention"} <= {task.family(None, model) for model in task.models()}
    assert task.scope.whole


def test_a_classifier_from_training_to_speed(monkeypatch):
    monkeypatch.setitem(
        ARCHITECTURES, "resnet-basic", dataclasses.replace(ARCHITECTURES["resnet-basic"], epochs=1)
    )
    task = task_for("classification", {"copies": 1, "calibration_images": 40, "rounds": 3})
    model = task.load("resnet-basic", seed=0)
    batches = task.calibration(model, "resnet-basic", seed=0)
    assert [len(one["pixel_values"]) for one in batches] == [32, 8]
    assert torch.equal(
        batches[0]["pixel_values"], task.calibration(model, "resnet-basic", seed=0)[0]["pixel_values"]
    )
    found = task.quality(model, "resnet-basic", seed=0)
    assert 0.05 <= found.value <= 1.0
    assert found.others["images"] == 597
    assert own_batches(batches, None, None).sequences == 40
    speeds = task.speed(model, model, "resnet-basic", threads=1)
    assert [(one.unit, one.batch) for one in speeds] == [("images/s", 1), ("images/s", 32)]
    assert all(0 < one.ratio_p10 <= one.ratio <= one.ratio_p90 for one in speeds)


def test_generators_are_calibrated_on_what_they_read():
    task = task_for("generation", {"calibration_images": 40})
    flow = task.calibration(None, "flow-unet", seed=0)
    assert [one["sample"].shape for one in flow] == [(32, 1, 8, 8), (8, 1, 8, 8)]
    assert all(((one["timestep"] >= 0) & (one["timestep"] <= 1)).all() for one in flow)
    assert task.calibration(None, "vae-decoder", seed=0)[0]["sample"].shape == (32, LATENT)


def test_rates_are_learned_for_outputs_that_are_images():
    torch.manual_seed(0)
    model = GENERATORS["vae-decoder"].build().eval()
    layout = discover(model, ("Linear", "Conv2d"), (), whole=True)
    batches = task_for("generation", {"calibration_images": 32}).calibration(None, "vae-decoder", seed=0)
    rates = learn_rates(layout, batches, 0.6, FCPTS(epochs=3, loss="mse"))
    sizes = {layer.path: layer.size for layer in layout.layers}
    mean = sum(rates[path] * size for path, size in sizes.items()) / sum(sizes.values())
    assert mean == pytest.approx(0.6, abs=1e-6)
    assert len(set(rates.values())) > 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "model", "bound"),
    [
        ("classification", "resnet-basic", 0.7),
        ("detection", "resnet", 0.3),
        ("generation", "vae-decoder", 60.0),
    ],
)
def test_a_trained_model_is_useful(task, model, bound):
    chosen = task_for(task)
    found = chosen.quality(chosen.load(model, seed=0), model, seed=0)
    assert (found.value > bound) == found.higher_is_better
    assert generators.lesson("flow-unet").path(0) != generators.lesson("flow-transformer").path(0)
