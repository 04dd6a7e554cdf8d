"""skorch: a classifier that trains on mixed batches, in scikit-learn's tools as well."""

import pickle

import numpy as np
import pytest
import torch

import mixupe_kernels as mk

from . import library

skorch = library("skorch")
sklearn = library("sklearn")


class Net(torch.nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.layers = mk.split_batch_norm(
            torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.BatchNorm1d(width), torch.nn.Linear(width, 3))
        )

    def forward(self, x):
        return self.layers(x)


def iris():
    from sklearn.datasets import load_iris

    x, labels = load_iris(return_X_y=True)
    return ((x - x.mean(0)) / x.std(0)).astype(torch.tensor(0.0).numpy().dtype), labels.astype(np.int64)


def classifier(mixup_fn=None, **options):
    from mixupe_kernels.integrations.skorch import MixupClassifier

    torch.manual_seed(0)
    collate = mk.Collate(mixup_fn or mk.MixupE(clean_fraction=1 / 4))
    options = {"max_epochs": 10, "lr": 0.1, "batch_size": 16, "iterator_train__shuffle": True, "verbose": 0, **options}
    return MixupClassifier(
        Net, iterator_train__collate_fn=collate, criterion__eta=0.1, criterion__clean_weight=1 / 4, **options
    )


def test_a_fit(followed):
    x, labels = iris()
    net = classifier().fit(x, labels)
    assert followed.losses == followed.mixed == 10
    assert net.score(x, labels) > 0.85
    probabilities = net.predict_proba(x)
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
    logits = net.forward(x)
    valid = net.history[-1, "valid_loss"]
    assert 0 < valid < 1.2 and logits.shape == (150, 3)


def test_the_schedule_is_driven():
    x, labels = iris()
    mixup_fn = mk.MixupE(warmup_epochs=2)
    net = classifier(mixup_fn, max_epochs=3).fit(x, labels)
    assert mixup_fn.epoch == 2 and mixup_fn.steps == len(net.history[-1]["batches"]) - sum(
        "valid_loss" in batch and "train_loss" not in batch for batch in net.history[-1]["batches"]
    )


def test_without_a_mixer():
    x, labels = iris()
    net = classifier(max_epochs=2)
    del net.iterator_train__collate_fn
    net.set_params(iterator_train__collate_fn=torch.utils.data.default_collate)
    net.fit(x, labels)


def test_in_the_tools_of_scikit_learn():
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, labels = iris()
    search = GridSearchCV(classifier(max_epochs=2), {"module__width": [8, 16]}, cv=2).fit(x, labels)
    assert search.best_score_ > 0.2
    twin = sklearn.base.clone(classifier())
    assert twin.get_params()["criterion__eta"] == 0.1
    scaled = make_pipeline(StandardScaler(), classifier(max_epochs=2)).fit(x, labels)
    assert scaled.predict(x).shape == (150,)
    net = classifier(max_epochs=2).fit(x, labels)
    again = pickle.loads(pickle.dumps(net))
    np.testing.assert_array_equal(again.predict(x), net.predict(x))


def test_the_plain_classifier_takes_the_criterion_too():
    """Without the adapter: plain batches and their cross-entropy."""
    x, labels = iris()

    class Plain(Net):
        def __init__(self):
            torch.nn.Module.__init__(self)
            self.layers = torch.nn.Linear(4, 3)

    net = skorch.NeuralNetClassifier(Plain, criterion=mk.MixupELoss, max_epochs=2, verbose=0).fit(x, labels)
    assert net.history[-1, "train_loss"] == pytest.approx(net.history[-1, "valid_loss"], abs=0.5)
