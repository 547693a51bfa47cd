import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn
from torch import nn

from trainkit import TensorSplit
from trainkit.errors import RecipeError, RunError
from trainkit.testing import assert_refuses, build_run, from_recipe, run_steps, watch
from trainkit_binary_cross_entropy_with_logits import BinaryCrossEntropyWithLogits
from trainkit_metrics import Metrics
from trainkit_mixup import Mixup
from trainkit_torchmetrics import TorchMetrics

NAMES = [f"class {label}" for label in range(4)]


class Noted:
    """Notes what the network gave in the last epoch, by split."""

    def __init__(self):
        self.batches = {}

        def note(run, batch, output):
            self.batches.setdefault(run.split, []).append((output.detach().double(), batch.targets))

        def clear():
            self.batches.clear()

        self.plugin = watch(forward_end=note, epoch_start=clear)

    def of(self, split):
        outputs, targets = map(torch.cat, zip(*self.batches[split], strict=True))
        return outputs, targets.numpy()


def measured(plugin, **plugins):
    """Return the last record of a run whose batches are of unequal size, and what its network gave."""
    noted = Noted()
    run = run_steps({**plugins, "torchmetrics": plugin, "noted": noted.plugin}, steps=14, epochs=2, batch_size=5)
    return run, noted


def calibration_error(probabilities, targets, bins):
    """The expected calibration error: the mean gap of confidence and accuracy over bins of confidence, by hand."""
    confidence, correct = probabilities.max(1), probabilities.argmax(1) == targets
    bin_of = np.digitize(confidence, np.linspace(0, 1, bins + 1)[1:-1])
    gaps = [abs(confidence[bin_of == b].sum() - correct[bin_of == b].sum()) for b in range(bins)]
    return sum(gaps) / len(targets)


def test_metrics_of_classes_are_those_of_all_images_of_a_split():
    compute = {
        "f1_score": {"average": "macro"},
        "accuracy/top_2": {"top_k": 2, "average": "micro"},
        "precision/weighted": {"average": "weighted"},
        "cohen_kappa": None,
        "auroc": {},
        "calibration_error": {"n_bins": 10},
        "recall": {"average": "none"},
    }
    run, noted = measured(TorchMetrics(compute=compute))
    for split in ("train", "test"):
        outputs, targets = noted.of(split)
        probabilities = outputs.softmax(1).numpy()
        predicted = probabilities.argmax(1)
        expected = {
            "f1_score": sklearn.f1_score(targets, predicted, average="macro"),
            "accuracy_top_2": sklearn.top_k_accuracy_score(targets, probabilities, k=2),
            "precision_weighted": sklearn.precision_score(targets, predicted, average="weighted", zero_division=0),
            "cohen_kappa": sklearn.cohen_kappa_score(targets, predicted),
            "auroc": sklearn.roc_auc_score(targets, probabilities, multi_class="ovr"),
            "calibration_error": calibration_error(probabilities, targets, 10),
            **{
                f"recall_{name}": recall
                for name, recall in zip(NAMES, sklearn.recall_score(targets, predicted, average=None), strict=True)
            },
        }
        found = {key: value for key, value in run.history[-1].items() if key.startswith(split)}
        assert found == {f"{split}_{name}": pytest.approx(value, abs=1e-6) for name, value in expected.items()}
    assert run.metric_info["test_f1_score"].better == "more"
    assert run.metric_info["test_calibration_error"].better == "less"


def change(make, **changes):
    """Return a plugin that makes other targets of the classes."""

    def changed(data):
        train, test = (TensorSplit(split.images, make(split.targets)) for split in (data.train, data.test))
        return data.replace(train=train, test=test, **changes)

    return watch(transform_data=changed)


def several(targets):
    """Labels: the class, and for every second image class 0."""
    labels = nn.functional.one_hot(targets, 4).float()
    labels[::2, 0] = 1
    return labels


def test_metrics_of_labels():
    compute = {"f1_score": {"average": "none"}, "average_precision": {"average": "macro"}, "ranking_loss": {}}
    plugin = TorchMetrics(compute=compute, task="multilabel")
    run, noted = measured(plugin, labels=change(several), loss=BinaryCrossEntropyWithLogits())
    outputs, targets = noted.of("test")
    f1 = sklearn.f1_score(targets, outputs > 0, average=None, zero_division=0)
    expected = {
        **{f"f1_score_{name}": value for name, value in zip(NAMES, f1, strict=True)},
        "average_precision": sklearn.average_precision_score(targets, outputs),
        "ranking_loss": sklearn.label_ranking_loss(targets, outputs),
    }
    for name, value in expected.items():
        assert run.history[-1][f"test_{name}"] == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("numbers", [0, 1, 3])
def test_metrics_of_numbers(numbers):
    def make(targets):  # one number, as a scalar or a vector, or three
        return (targets + 1.0) if numbers == 0 else torch.stack([targets + 1.0 + k for k in range(numbers)], 1)

    network = nn.Sequential(nn.Flatten(), nn.Linear(192, max(numbers, 1)))
    beside = {
        "network": watch(model=lambda: network),
        "numbers": change(make, classes=()),
        "loss": watch(loss=lambda: lambda output, targets: nn.functional.mse_loss(output.view(targets.shape), targets)),
        "optimizer": watch(optimizer=lambda params: torch.optim.SGD(params, lr=1e-3)),
    }
    run, noted = measured(
        TorchMetrics(compute={"mean_absolute_error": {}, "r2_score": {}}, task="regression"), **beside
    )
    for split in ("train", "test"):
        outputs, targets = noted.of(split)
        outputs = outputs.numpy().reshape(targets.shape)
        found = run.history[-1]
        assert found[f"{split}_mean_absolute_error"] == pytest.approx(sklearn.mean_absolute_error(targets, outputs))
        assert found[f"{split}_r2_score"] == pytest.approx(sklearn.r2_score(targets, outputs), rel=1e-4)


def test_several_numbers_have_a_value_each():
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    plugins = {
        "network": watch(model=lambda: network),
        "numbers": change(lambda targets: torch.stack([targets, 2.0 * targets], 1), classes=()),
        "loss": watch(loss=lambda: nn.functional.mse_loss),
    }
    compute = {"mean_squared_error": {"num_outputs": 2}}
    run = run_steps({**plugins, "torchmetrics": TorchMetrics(compute=compute, task="regression")})
    assert {"test_mean_squared_error_0", "test_mean_squared_error_1"} <= run.history[-1].keys()


def test_a_mixture_counts_as_its_most_probable_class():
    both = {"accuracy/all": {"average": "micro"}}
    run = run_steps({"mixup": Mixup(), "torchmetrics": TorchMetrics(compute=both), "metrics": Metrics()}, steps=4)
    assert run.history[-1]["train_accuracy_all"] * 100 == pytest.approx(run.history[-1]["train_accuracy"])


def test_outputs_are_kept_within_an_epoch_and_not_beyond_it():
    kept = []

    def note(run):
        (state,) = run.state_dict()["plugins"]["torchmetrics"]["state"].values()
        kept.append(sum(len(outputs) for outputs in state["state"]["preds"]))

    run_steps({"torchmetrics": TorchMetrics(compute={"auroc": {}}), "note": watch(safe_point=note)}, steps=4, epochs=1)
    assert kept == [8, 16, 24, 32, 0]


def test_leaving_it_out_changes_no_weight():
    first, second = run_steps({"torchmetrics": TorchMetrics(compute={"auroc": {}})}), run_steps({})
    assert all(map(torch.equal, first.model.state_dict().values(), second.model.state_dict().values()))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"compute": {"f1_scor": {}}},
            "'compute': torchmetrics has no multiclass metric 'f1_scor'; did you mean 'f1_score",
        ),
        ({"compute": {"f1_score": {"averag": "macro"}}}, "'compute': f1_score: .*averag"),
        ({"compute": {"f1_score": {"average": "most"}}}, "'compute': f1_score: .*average"),
        ({"compute": {"accuracy/top_9": {"top_k": 9}}}, "'compute': accuracy/top_9: .*top_k"),
        ({"compute": {"confusion_matrix": {}}}, r"confusion_matrix gives neither one number .*: int64 \[4, 4\]"),
        ({"compute": {"roc": {}}}, "roc gives neither one number nor one for each class: tuple"),
        ({"compute": {"recall/a_b": {}, "recall_a/b": {}}}, "torchmetrics has no multiclass metric 'recall_a'"),
        (
            {"compute": {"recall": {"average": "none"}, "recall/class 1": {}}},
            "recall and recall/class 1 are both reported as 'recall_class 1'; rename one",
        ),
        (
            {"compute": {"f1_score": {}}, "task": "multilabel"},
            "targets of multilabel are a 0 or 1 for each of 4 labels",
        ),
        (
            {"compute": {"mean_absolute_error": {}}, "task": "regression"},
            "of regression are numbers, .* are classes; set",
        ),
    ],
)
def test_what_cannot_be_computed_is_one_clear_error(options, said):
    with pytest.raises(RecipeError, match=said):
        build_run({"torchmetrics": TorchMetrics(**options)})


def test_labels_are_no_classes():
    with pytest.raises(RecipeError, match=r"targets of multiclass are classes, and the data's are float32 \[4\]; set"):
        build_run({"labels": change(several), "torchmetrics": TorchMetrics(compute={"f1_score": {}})})


def test_a_name_that_another_plugin_reports_is_an_error():
    with pytest.raises(RunError, match="both report the metric 'accuracy'"):
        run_steps({"metrics": Metrics(), "torchmetrics": TorchMetrics(compute={"accuracy": {}})})


def test_options_of_a_metric_are_a_mapping():
    assert_refuses(TorchMetrics, "compute", {}, {"f1_score": "macro"}, {"f1_score": ["macro"]})
    assert from_recipe(TorchMetrics, compute={"f1_score": None}).compute == {"f1_score": None}
